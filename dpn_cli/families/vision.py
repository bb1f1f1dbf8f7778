"""The vision towers whose features are one square grid. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpn_cli.pyramid.shape import Shapes

HR_TOWER = "llava_hr_vision"  # the model type of LLaVA-HR's


@dataclass(frozen=True)
class VisionTower:
    """A vision tower.

    Attributes:
        model_type: model type of its configs.
        select_strategy: the `vision_feature_select_strategy` that leaves exactly the grid.
        defaults: what its config class assumes for the keys that matter here, if they are left out.
        tensors: returns the shapes of its tensors from a complete vision_config, by their names inside the tower.
        prefix: the prefix of those names in files of the hub.
        is_stock: whether transformers has it, so that checkpoints in Hugging Face's layout come with it.
    """

    model_type: str
    select_strategy: str
    defaults: Mapping[str, Any]
    tensors: Callable[[dict[str, Any]], Shapes]
    prefix: str = "vision_tower.vision_model."
    is_stock: bool = True

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a vision_config with the defaults filled in."""
        return {**self.defaults, **config}


def clip_tensors(vision: dict[str, Any]) -> Shapes:
    """Return what a CLIP vision transformer has."""
    hidden, patch = vision["hidden_size"], vision["patch_size"]
    shapes: Shapes = {
        "embeddings.class_embedding": (hidden,),
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2 + 1, hidden),
    }
    return shapes | _norm("pre_layrnorm", hidden) | _norm("post_layernorm", hidden) | _vision_layers(vision)


def siglip_tensors(vision: dict[str, Any]) -> Shapes:
    """Return what a SigLIP vision transformer has."""
    hidden, patch = vision["hidden_size"], vision["patch_size"]
    shapes: Shapes = {
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.patch_embedding.bias": (hidden,),
        "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2, hidden),
    }
    shapes |= _norm("post_layernorm", hidden) | _vision_layers(vision)
    if vision.get("vision_use_head", True):
        shapes |= {"head.probe": (1, 1, hidden), "head.attention.in_proj_weight": (3 * hidden, hidden)}
        shapes |= {"head.attention.in_proj_bias": (3 * hidden,)} | _linear("head.attention.out_proj", hidden, hidden)
        shapes |= _norm("head.layernorm", hidden) | _mlp("head.mlp", vision)
    return shapes


def hr_tensors(vision: dict[str, Any]) -> Shapes:
    """Return what LLaVA-HR's tower has: CLIP, ConvNeXt, the adapters between them and the final alignment."""
    fast, slow = vision["fast_config"]["hidden_size"], vision["slow_config"]["hidden_sizes"][-1]
    shapes = {f"fast.{name}": shape for name, shape in clip_tensors(vision["fast_config"]).items()}
    shapes |= {f"slow.{name}": shape for name, shape in convnext_tensors(vision["slow_config"]).items()}
    shapes |= _linear("alignment.fast_proj", fast, fast) | _linear("alignment.slow_proj", slow, fast)
    for i in range(3 if vision["has_adapters"] else 0):
        adapter = _conv("slow_conv", slow, slow, 1) | _conv("slow_proj", slow, fast, 1)
        adapter |= _conv("fast_conv", 1, fast, 7) | _conv("fast_proj", fast, fast, 1)
        adapter |= _linear("gate.0", 2 * fast, fast // 2) | _linear("gate.2", fast // 2, 1)
        shapes |= {f"adapters.{i}.{name}": shape for name, shape in adapter.items()}
    return shapes


def convnext_tensors(slow: dict[str, Any]) -> Shapes:
    """Return what a ConvNeXt has without its head, each block with a layer scale."""
    shapes: Shapes = {}
    before = 3  # channels of a picture
    for i, (depth, width) in enumerate(zip(slow["depths"], slow["hidden_sizes"], strict=True)):
        down = f"{i}.downsample_layers"
        if i == 0:
            shapes |= _conv(f"{down}.0", before, width, 4) | _norm(f"{down}.1", width)
        else:
            shapes |= _norm(f"{down}.0", before) | _conv(f"{down}.1", before, width, 2)
        for block in (f"{i}.layers.{j}" for j in range(depth)):
            shapes |= _conv(f"{block}.depthwise_conv", 1, width, 7) | _norm(f"{block}.layer_norm", width)
            shapes |= _linear(f"{block}.pointwise_conv1", width, 4 * width)
            shapes |= _linear(f"{block}.pointwise_conv2", 4 * width, width) | {f"{block}.gamma": (width,)}
        before = width
    return shapes


def _vision_layers(vision: dict[str, Any]) -> Shapes:
    hidden = vision["hidden_size"]
    layer = _norm("layer_norm1", hidden) | _norm("layer_norm2", hidden) | _mlp("mlp", vision)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= _linear(f"self_attn.{name}", hidden, hidden)
    layers = range(vision["num_hidden_layers"])
    return {f"encoder.layers.{i}.{name}": size for i in layers for name, size in layer.items()}


def _mlp(name: str, vision: dict[str, Any]) -> Shapes:
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    return _linear(f"{name}.fc1", hidden, inner) | _linear(f"{name}.fc2", inner, hidden)


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


VISION_TOWERS = {
    tower.model_type: tower
    for tower in (
        VisionTower(
            "clip_vision_model",
            select_strategy="default",
            defaults={
                "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12,
                "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 32,
                "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
            },
            tensors=clip_tensors,
        ),
        VisionTower(
            "siglip_vision_model",
            select_strategy="full",
            defaults={
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224,
                "patch_size": 16,
            },
            tensors=siglip_tensors,
        ),
        VisionTower(
            HR_TOWER,
            select_strategy="full",
            defaults={"image_size": 1024, "patch_size": 32},
            tensors=hr_tensors,
            prefix="vision_tower.",
            is_stock=False,
        ),
    )
}  # fmt: skip
