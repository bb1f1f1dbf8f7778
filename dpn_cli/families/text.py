"""The text models that can have a pyramid: decoders of the Llama kind. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpn_cli.pyramid.shape import DecoderShape, Shapes

REQUIRED_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class TextModel:
    """A text model.

    Attributes:
        model_type: model type of its configs.
        class_name: transformers' class of the model without a head.
        defaults: what transformers' config class assumes for the keys that matter here, if they are left out.
        biased: the linear layers that always have a bias.
        biased_where: the linear layers that have a bias where a key of the config is true.
        head_norms: whether the queries and keys of every head are normalised (`q_norm`, `k_norm`).
        full_attention: the values of the config's keys with which attention has no sliding window; empty if it never
            has one.
        original: the architecture of a LLaVA with this text model in the original layout; None if there is none.
    """

    model_type: str
    class_name: str
    defaults: Mapping[str, Any]
    biased: tuple[str, ...] = ()
    biased_where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_norms: bool = False
    full_attention: Mapping[str, Any] = field(default_factory=dict)
    original: str | None = None

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a text_config with transformers' defaults filled in."""
        return {**self.defaults, **config}

    def has_window(self, config: Mapping[str, Any]) -> bool:
        """Say whether a text_config asks for sliding-window attention."""
        config = self.completed(config)
        windowed = any(config.get(key) != value for key, value in self.full_attention.items())
        return bool(self.full_attention) and (windowed or "sliding_attention" in str(config.get("layer_types")))

    def tensors(self, config: Mapping[str, Any]) -> Shapes:
        """Return the shapes of the model's tensors from a complete text_config, by their names inside the model."""
        shape = DecoderShape.from_config(config)
        hidden, inner = shape.hidden_size, shape.intermediate_size
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        sizes = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
        sizes += [(inner, hidden), (inner, hidden), (hidden, inner)]
        linear = dict(zip((*_ATTENTION, *_MLP), sizes, strict=True))
        biased = set(self.biased).union(*(names for key, names in self.biased_where.items() if config.get(key)))
        layer: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        layer |= {f"{name}.weight": size for name, size in linear.items()}
        layer |= {f"{name}.bias": linear[name][:1] for name in biased}
        if self.head_norms:
            layer |= {f"self_attn.{name}.weight": (shape.head_dim,) for name in ("q_norm", "k_norm")}
        shapes: Shapes = {"embed_tokens.weight": (shape.vocab_size, hidden), "norm.weight": (hidden,)}
        return shapes | {f"layers.{i}.{name}": size for i in range(shape.num_layers) for name, size in layer.items()}


_QWEN_DEFAULTS = {
    "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 151936, "use_sliding_window": False,
}  # fmt: skip

TEXT_MODELS = {
    text.model_type: text
    for text in (
        TextModel(
            "llama",
            "LlamaModel",
            defaults={
                "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                "vocab_size": 32000,
            },
            biased_where={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
            original="LlavaLlamaForCausalLM",
        ),
        TextModel(
            "mistral",
            "MistralModel",
            defaults={
                "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": 4096,
            },
            full_attention={"sliding_window": None},
            original="LlavaMistralForCausalLM",
        ),
        TextModel(
            "qwen2",
            "Qwen2Model",
            defaults=_QWEN_DEFAULTS,
            biased=_ATTENTION[:3],
            full_attention={"use_sliding_window": False},
        ),
        TextModel(
            "qwen3",
            "Qwen3Model",
            defaults=_QWEN_DEFAULTS | {"head_dim": 128},
            biased_where={"attention_bias": _ATTENTION},
            head_norms=True,
            full_attention={"use_sliding_window": False},
        ),
    )
}  # fmt: skip

ORIGINALS = {text.original: text for text in TEXT_MODELS.values() if text.original is not None}
