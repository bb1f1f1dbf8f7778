"""The sizes of a decoder, and the FLOPs and KV-cache bytes that one of its layers takes. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a Llama-type decoder that its cost depends on."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, text_config: Mapping[str, Any]) -> "DecoderShape":
        """Read the shape from a text config's dictionary.

        Raises:
            KeyError: if a size that has no safe default is missing.
        """
        heads = text_config["num_attention_heads"]
        return cls(
            num_layers=text_config["num_hidden_layers"],
            hidden_size=text_config["hidden_size"],
            intermediate_size=text_config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=text_config.get("num_key_value_heads") or heads,
            head_dim=text_config.get("head_dim") or text_config["hidden_size"] // heads,
            vocab_size=text_config["vocab_size"],
        )

    def layer_flops(self, tokens: int) -> int:
        """Return the prefill FLOPs of one decoder layer over `tokens` tokens."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        projections = 2 * tokens * self.hidden_size * (2 * query + 2 * key_value)
        attention = 2 * 2 * tokens * tokens * query
        mlp = 3 * 2 * tokens * self.hidden_size * self.intermediate_size
        return projections + attention + mlp

    def kv_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Return the KV-cache bytes of one layer that holds `tokens` tokens."""
        return 2 * tokens * self.num_kv_heads * self.head_dim * bytes_per_value
