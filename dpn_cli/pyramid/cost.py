"""What a forward costs: exact prefill FLOPs and KV-cache bytes of a decoder, from its shape and its token counts.

A multiplication and an addition are two operations, as in `torch.utils.flop_counter`, which counts the same on a
real forward (tests/test_cost.py). Counted: the projections, the attention products and the MLP of every decoder
layer, plus the routers. Attention is counted as the full S×S product, which is what eager and SDPA kernels without
causal skipping compute. Left out, as the counter leaves it out: norms, softmax, activations, rotary embeddings and
pooling. The vision tower, the projector and `lm_head` belong to the original and the pyramid alike, and are
reported apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpn_cli.pyramid.config import Grid, PyramidConfig, Route


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

    def head_flops(self, tokens: int = 1) -> int:
        """Return the FLOPs of `lm_head` for `tokens` positions (prefill needs one)."""
        return 2 * tokens * self.hidden_size * self.vocab_size

    def kv_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Return the KV-cache bytes of one layer that holds `tokens` tokens."""
        return 2 * tokens * self.num_kv_heads * self.head_dim * bytes_per_value


def router_flops(shape: DecoderShape, pyramid: PyramidConfig, site: int) -> int:
    """Return the FLOPs of one routing decision."""
    tensors = pyramid.router.tensors(shape.hidden_size, len(pyramid.sites[site].rates))
    return 2 * sum(math.prod(size) for size in tensors.values() if len(size) == 2)


def tokens_per_layer(
    shape: DecoderShape, pyramid: PyramidConfig, route: Route, grids: Sequence[Grid], text_tokens: int
) -> list[int]:
    """Return the prefill tokens of every decoder layer along `route`."""
    stages = pyramid.walk(route, grids)
    counts = [text_tokens + sum(h * w for h, w in stage) for stage in stages]
    return [count for count, layers in zip(counts, pyramid.segments(shape.num_layers), strict=True) for _ in layers]


def flops_fraction(
    shape: DecoderShape, pyramid: PyramidConfig, route: Route, grids: Sequence[Grid], text_tokens: int
) -> float:
    """Return the prefill FLOPs along `route` as a fraction of the unpooled decoder's, routers included.

    A sample without an image costs 1.0: nothing is pooled and no router is asked.
    """
    counts = [text_tokens + sum(h * w for h, w in stage) for stage in pyramid.walk(route, grids)]
    segments = pyramid.segments(shape.num_layers)
    routed = sum(len(layers) * shape.layer_flops(n) for layers, n in zip(segments, counts, strict=True))
    if grids and pyramid.has_routers:
        routed += sum(router_flops(shape, pyramid, site) for site in range(len(pyramid.sites)))
    return routed / (shape.num_layers * shape.layer_flops(counts[0]))
