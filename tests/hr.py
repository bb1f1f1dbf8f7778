"""A small random LLaVA-HR in the original layout, and its vision tower as plain functions of its tensors."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dpn_cli.families.text import TEXT_MODELS
from tests.originals import Original

Tensors = dict[str, torch.Tensor]
TOWER = "model.vision_tower."
FAST = f"{TOWER}fast_vision_tower.vision_tower.vision_model."
SLOW = f"{TOWER}slow_vision_tower.vision_tower."
WIDTH, LAYERS = 64, 8  # of CLIP
DEPTHS, DIMS = (1, 2, 1, 1), (8, 16, 24, 32)  # of ConvNeXt
SIZE = 256  # of the whole model's pictures: 8×8 visual tokens


FULL_SIZES: dict[str, dict[str, Any]] = {
    "llava-hr-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "dims": (192, 384, 768, 1536), "depths": (3, 3, 27, 3),
        "tag": "convnext_large_mlp.clip_laion2b_ft_320",
    },
    "llava-hr-x-13b": {
        "hidden_size": 5120, "intermediate_size": 13824, "dims": (384, 768, 1536, 3072), "depths": (3, 4, 30, 3),
        "tag": "convnext_xxlarge.clip_laion2b_soup",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Hr:
    """A LLaVA-HR in the original layout.

    Attributes:
        original: its folder; of its model, the language model.
        tensors: of tower and projector, by their names in the folder.
    """

    original: Original
    tensors: Tensors

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the visual tokens [B, V, D] of pictures [B, 3, S, S]."""
        inner = F.gelu(linear(self.tensors, "model.mm_projector.0", features(self.tensors, pixels)))
        return linear(self.tensors, "model.mm_projector.2", inner)

    def logits(self, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits [L, rows] of a prompt in which -1 stands for its one image, of a stock language model."""
        model: Any = self.original.reference()
        place = ids.index(-1)
        before, after = (model.get_input_embeddings()(torch.tensor([part])) for part in (ids[:place], ids[place + 1 :]))
        hidden = torch.cat([before, self.embed(pixels), after], 1)
        output = model.model.language_model(inputs_embeds=hidden).last_hidden_state
        return model.lm_head(output)[0, :, : self.original.rows]


@pytest.fixture
def make_hr(make_original: Callable[..., Original]) -> Callable[..., Hr]:
    """Return `make(frozen, scale, **options of write_original) -> Hr`, with a folder of its own."""

    def make(frozen: bool = False, scale: str = "weight", **options: Any) -> Hr:
        original = make_original(**options)
        tensors = random_tower(frozen=frozen, scale=scale)
        for seed, layer in enumerate((0, 2)):
            generator = torch.Generator().manual_seed(seed)
            tensors[f"model.mm_projector.{layer}.weight"] = torch.randn(64, 64, generator=generator) / 8
            tensors[f"model.mm_projector.{layer}.bias"] = torch.randn(64, generator=generator) / 8
        tensors = {name: tensor.to(original.config.dtype) for name, tensor in tensors.items()}
        original.add(tensors)
        original.edit(
            is_multipath_encoder=True, freeze_vision=frozen, input_image_size=SIZE, delay_load=False,
            vision_tower_slow="convnext_large_mlp.clip_laion2b_ft_320",
        )  # fmt: skip
        return Hr(original, tensors)

    return make


def write_full_size(folder: Path, tokenizer_model: Path, model: str, num_layers: int) -> int:
    """Write a checkpoint in the shapes of the authors' models, all zeros in fp16: a file that takes no room.

    Args:
        folder: to write.
        tokenizer_model: from the fixture of this name.
        model: of `FULL_SIZES`.
        num_layers: of the decoder.

    Returns:
        Bytes of its tensors.
    """
    sizes = FULL_SIZES[model]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    decoder = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // 128, "vocab_size": 32000,
    }  # fmt: skip
    shapes = tower_shapes(1024, 24, sizes["dims"], sizes["depths"], patch=14, clip_size=336)
    shapes |= {f"model.{name}": shape for name, shape in TEXT_MODELS["llama"].tensors(decoder).items()}
    shapes |= {"lm_head.weight": (32000, hidden)}
    shapes |= {"model.mm_projector.0.weight": (hidden, 1024), "model.mm_projector.0.bias": (hidden,)}
    shapes |= {"model.mm_projector.2.weight": (hidden, hidden), "model.mm_projector.2.bias": (hidden,)}
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (start, end)}
        text = json.dumps(header).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    config = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": hidden, "vocab_size": 32000,
        "intermediate_size": inner, "num_hidden_layers": num_layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "torch_dtype": "float16", "image_aspect_ratio": "pad", "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "vision_tower_slow": sizes["tag"],
        "is_multipath_encoder": True, "freeze_vision": False, "input_image_size": 1024,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return end


def tower_shapes(
    width: int = WIDTH,
    layers: int = LAYERS,
    dims: tuple[int, ...] = DIMS,
    depths: tuple[int, ...] = DEPTHS,
    patch: int = 4,
    clip_size: int = 16,
    frozen: bool = False,
    scale: str = "weight",
) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a tower as the authors' code saves them.

    Args:
        width: of CLIP; its MLP is four times as wide.
        layers: of CLIP.
        dims: widths of ConvNeXt's stages.
        depths: blocks of ConvNeXt's stages.
        patch: of CLIP, in pixels.
        clip_size: side of CLIP's own pictures, in pixels.
        frozen: trained with `freeze_vision`, so that nothing joins the towers between CLIP's layers.
        scale: what ConvNeXt calls its layer scale.
    """
    both: dict[str, tuple[int, ...]] = {f"{FAST}{name}": (width,) for name in ("pre_layrnorm", "post_layernorm")}
    for layer in (f"{FAST}encoder.layers.{i}." for i in range(layers)):
        both |= {f"{layer}self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        both |= {f"{layer}layer_norm1": (width,), f"{layer}layer_norm2": (width,)}
        both |= {f"{layer}mlp.fc1": (4 * width, width), f"{layer}mlp.fc2": (width, 4 * width)}
    both |= {f"{SLOW}stem.0": (dims[0], 3, 4, 4), f"{SLOW}stem.1": (dims[0],), f"{SLOW}head.norm": (dims[-1],)}
    scales = {}
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if i:
            both |= {f"{SLOW}stages.{i}.downsample.0": (dims[i - 1],)}
            both |= {f"{SLOW}stages.{i}.downsample.1": (dim, dims[i - 1], 2, 2)}
        for block in (f"{SLOW}stages.{i}.blocks.{j}." for j in range(depth)):
            scales[block + scale] = (dim,)
            both |= {f"{block}conv_dw": (dim, 1, 7, 7), f"{block}norm": (dim,)}
            both |= {f"{block}mlp.fc1": (4 * dim, dim), f"{block}mlp.fc2": (dim, 4 * dim)}
    for adapter in (f"{TOWER}align_stages_latent.{i}." for i in range(0 if frozen else 3)):
        both |= {f"{adapter}slow_conv": (dims[-1], dims[-1], 1, 1), f"{adapter}slow_proj": (width, dims[-1], 1, 1)}
        both |= {f"{adapter}fast_conv": (width, 1, 7, 7), f"{adapter}fast_proj": (width, width, 1, 1)}
        both |= {f"{adapter}gate.0": (width // 2, 2 * width), f"{adapter}gate.2": (1, width // 2)}
    both |= {f"{TOWER}align_stages.0.fast_proj": (width, width), f"{TOWER}align_stages.0.slow_proj": (width, dims[-1])}
    return {
        f"{FAST}embeddings.class_embedding": (width,),
        f"{FAST}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{FAST}embeddings.position_embedding.weight": ((clip_size // patch) ** 2 + 1, width),
        **{f"{name}.weight": shape for name, shape in both.items()},
        **{f"{name}.bias": shape[:1] for name, shape in both.items()},
        **scales,
    }


def random_tower(**options: Any) -> Tensors:
    """Return a small tower; for the options see `tower_shapes`."""
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for name, shape in tower_shapes(**options).items():
        fan_in = 1 if "position" in name else torch.Size(shape[1:]).numel()
        tensors[name] = torch.randn(shape, generator=generator) / (16 if name.endswith("bias") else fan_in) ** 0.5
    return tensors


def features(t: Tensors, pixels: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return the features [B, V, D] of pictures [B, 3, S, S], from the description of the authors' code.

    Args:
        t: the tower's tensors.
        pixels: normalised.
        eps: of ConvNeXt's norms.
    """
    slow = convnext(t, pixels, eps)
    patch = t[f"{FAST}embeddings.patch_embedding.weight"]
    positions = t[f"{FAST}embeddings.position_embedding.weight"]
    own = int((len(positions) - 1) ** 0.5)
    size = max(int(pixels.shape[-1] / 32 * patch.shape[-1]), own * patch.shape[-1])
    fast = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=True)
    fast = F.conv2d(fast, patch, stride=patch.shape[-1]).flatten(2).transpose(1, 2)
    fast = torch.cat([t[f"{FAST}embeddings.class_embedding"].expand(len(fast), 1, -1), fast], 1)
    side = size // patch.shape[-1]
    if side != own:
        grid = positions[1:].view(1, own, own, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        positions = torch.cat([positions[:1], grid.permute(0, 2, 3, 1).view(side * side, -1)])
    fast = norm(t, f"{FAST}pre_layrnorm", (fast + positions)[:, 1:])
    for i in range(LAYERS):
        fast = clip_layer(t, f"{FAST}encoder.layers.{i}.", fast)
        joint = f"{TOWER}align_stages_latent.{(i + 1) // (LAYERS // 4) - 1}."
        if (i + 1) % (LAYERS // 4) == 0 and i + 1 < LAYERS and f"{joint}slow_conv.weight" in t:
            fast = adapter(t, joint, fast, slow)
    slow_tokens = fit(slow, side).flatten(2).transpose(1, 2)
    return linear(t, f"{TOWER}align_stages.0.fast_proj", fast) + linear(
        t, f"{TOWER}align_stages.0.slow_proj", slow_tokens
    )


def convnext(t: Tensors, x: torch.Tensor, eps: float) -> torch.Tensor:
    """Run stem and stages on [B, 3, S, S]; return [B, C, S/32, S/32]."""

    def norm2d(name: str, x: torch.Tensor) -> torch.Tensor:
        return norm(t, name, x.permute(0, 2, 3, 1), eps).permute(0, 3, 1, 2)

    x = norm2d(f"{SLOW}stem.1", F.conv2d(x, t[f"{SLOW}stem.0.weight"], t[f"{SLOW}stem.0.bias"], stride=4))
    for i, depth in enumerate(DEPTHS):
        down = f"{SLOW}stages.{i}.downsample."
        if i:
            x = F.conv2d(norm2d(f"{down}0", x), t[f"{down}1.weight"], t[f"{down}1.bias"], stride=2)
        for j in range(depth):
            block = f"{SLOW}stages.{i}.blocks.{j}."
            y = F.conv2d(x, t[f"{block}conv_dw.weight"], t[f"{block}conv_dw.bias"], padding=3, groups=x.shape[1])
            y = norm(t, f"{block}norm", y.permute(0, 2, 3, 1), eps)
            y = linear(t, f"{block}mlp.fc2", F.gelu(linear(t, f"{block}mlp.fc1", y)))
            scale = t[f"{block}weight"] if f"{block}weight" in t else t[f"{block}gamma"]
            x = x + (y * scale).permute(0, 3, 1, 2)
    return x


def clip_layer(t: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    """Run a layer of CLIP on [B, V, D]: heads of 64, quick GELU."""
    y = norm(t, f"{name}layer_norm1", x)
    query, key, value = (
        linear(t, f"{name}self_attn.{part}_proj", y).unflatten(2, (-1, 64)).transpose(1, 2) for part in "qkv"
    )
    weights = (query @ key.transpose(2, 3) / 8).softmax(-1)
    x = x + linear(t, f"{name}self_attn.out_proj", (weights @ value).transpose(1, 2).flatten(2))
    y = linear(t, f"{name}mlp.fc1", norm(t, f"{name}layer_norm2", x))
    return x + linear(t, f"{name}mlp.fc2", y * torch.sigmoid(1.702 * y))


def adapter(t: Tensors, name: str, fast: torch.Tensor, slow: torch.Tensor) -> torch.Tensor:
    """Join the towers between two layers: S2FStitchAlignModuleV2 on [B, V, D] and [B, C, h, w]."""

    def conv(part: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        return F.conv2d(x, t[f"{name}{part}.weight"], t[f"{name}{part}.bias"], **options)

    side = int(fast.shape[1] ** 0.5)
    added = fit(conv("slow_proj", F.gelu(conv("slow_conv", slow))), side).flatten(2).transpose(1, 2)
    grid = fast.transpose(1, 2).reshape(len(fast), -1, side, side)
    inner = F.gelu(conv("fast_conv", grid, padding=3, groups=grid.shape[1]))
    fast = (grid + conv("fast_proj", inner)).flatten(2).transpose(1, 2)
    gate = linear(t, f"{name}gate.0", torch.cat([fast, added], -1).mean(1))
    return fast + added * linear(t, f"{name}gate.2", F.gelu(gate)).tanh()[:, None]


def fit(x: torch.Tensor, side: int) -> torch.Tensor:
    """Bring [B, C, h, h] to another grid."""
    if x.shape[-1] < side:
        return F.interpolate(x, (side, side), mode="bilinear", align_corners=True)
    return F.avg_pool2d(x, x.shape[-1] // side)


def linear(t: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def norm(t: Tensors, name: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)
