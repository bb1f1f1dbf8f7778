"""LLaVA-HR's vision tower: CLIP on a small picture, ConvNeXt on the large one, joined on the way and at the end.

Source: Luo et al., Feast Your Eyes: Mixture-of-Resolution Adaptation for Multimodal Large Language Models
(https://arxiv.org/abs/2403.03003), and the code published with it.
"""

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DINOv3ConvNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextStage
from transformers.utils.generic import can_return_tuple

NUM_STAGES = 4  # CLIP's layers are cut into so many, with an adapter between two


@strict
class LlavaHrVisionConfig(PreTrainedConfig):
    """The two towers and what joins them.

    Attributes:
        fast_config: Config of the CLIP model; its `image_size` is the smallest picture that it gets.
        slow_config: Config of the ConvNeXt.
        has_adapters: whether the towers are joined between CLIP's layers too, or at the end alone.
        image_size: side of the picture, in pixels.
        patch_size: side of the square that becomes one visual token, in pixels.
        hidden_size: width of the features, CLIP's.
    """

    model_type = "llava_hr_vision"
    base_config_key = "vision_config"
    sub_configs = {"fast_config": CLIPVisionConfig, "slow_config": DINOv3ConvNextConfig}

    fast_config: Any = None
    slow_config: Any = None
    has_adapters: bool = True
    image_size: int = 1024
    patch_size: int = 32
    hidden_size: int = 1024
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the parts that came as plain data, or not at all."""
        for name, part in self.sub_configs.items():
            value = getattr(self, name) or {}
            setattr(self, name, part(**value) if isinstance(value, dict) else value)
        super().__post_init__(**kwargs)


def resampled(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Return the position embeddings of a square grid, from those of another.

    Args:
        positions: [n·n, D], row by row.
        side: Side of the grid, in tokens.

    Returns:
        [D, side, side].
    """
    grid = positions.T.unflatten(1, (math.isqrt(positions.shape[0]), -1))
    if grid.shape[1] == side:
        return grid
    # With antialias, unlike CLIP's own interpolation in transformers; it needs float32.
    return F.interpolate(grid[None].float(), size=side, mode="bicubic", antialias=True)[0].to(grid.dtype)


def aligned(features: torch.Tensor, side: int) -> torch.Tensor:
    """Return features [B, C, h, h] on a grid of another size, [B, C, side, side]."""
    if features.shape[-1] < side:
        larger = F.interpolate(features.float(), size=side, mode="bilinear", align_corners=True)
        return larger.to(features.dtype)
    return F.avg_pool2d(features, features.shape[-1] // side)


class MixtureOfResolutionAdapter(nn.Module):
    """What ConvNeXt saw, added to the hidden states of CLIP by a gate (paper, section 3.3)."""

    def __init__(self, fast_width: int, slow_width: int) -> None:
        super().__init__()
        self.slow_conv = nn.Conv2d(slow_width, slow_width, 1)
        self.slow_proj = nn.Conv2d(slow_width, fast_width, 1)
        self.fast_conv = nn.Conv2d(fast_width, fast_width, 7, padding=3, groups=fast_width)
        self.fast_proj = nn.Conv2d(fast_width, fast_width, 1)
        self.gate = nn.Sequential(nn.Linear(2 * fast_width, fast_width // 2), nn.GELU(), nn.Linear(fast_width // 2, 1))

    def forward(self, fast: torch.Tensor, slow: torch.Tensor) -> torch.Tensor:
        """Adapt CLIP's grid [B, D, H, W] to the features [B, C, h, w] of the other tower."""
        slow = aligned(self.slow_proj(F.gelu(self.slow_conv(slow))), fast.shape[-1])  # [B, D, H, W]
        fast = fast + self.fast_proj(F.gelu(self.fast_conv(fast)))
        gate = self.gate(torch.cat([fast, slow], 1).mean((2, 3))).tanh()  # [B, 1]
        return fast + slow * gate[..., None, None]


class FinalAlignment(nn.Module):
    """The sum of both towers' features, each projected."""

    def __init__(self, fast_width: int, slow_width: int) -> None:
        super().__init__()
        self.fast_proj = nn.Linear(fast_width, fast_width)
        self.slow_proj = nn.Linear(slow_width, fast_width)

    def forward(self, fast: torch.Tensor, slow: torch.Tensor) -> torch.Tensor:
        """Join CLIP's tokens [B, H·W, D] and the features [B, C, h, w] of the other tower."""
        slow = aligned(slow, math.isqrt(fast.shape[1])).flatten(2).transpose(1, 2)
        return self.fast_proj(fast) + self.slow_proj(slow)


class LlavaHrVisionModel(PreTrainedModel):
    """The tower; its features are the last hidden state, one square grid without a class token."""

    config_class = LlavaHrVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CLIPEncoderLayer", "DINOv3ConvNextLayer", "MixtureOfResolutionAdapter"]

    def __init__(self, config: LlavaHrVisionConfig) -> None:
        super().__init__(config)
        widths = config.fast_config.hidden_size, config.slow_config.hidden_sizes[-1]
        self.fast = CLIPVisionModel(config.fast_config)
        stages = range(len(config.slow_config.depths))
        self.slow = nn.Sequential(*(DINOv3ConvNextStage(config.slow_config, i) for i in stages))
        joints = NUM_STAGES - 1 if config.has_adapters else 0
        self.adapters = nn.ModuleList(MixtureOfResolutionAdapter(*widths) for _ in range(joints))
        self.alignment = FinalAlignment(*widths)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the features [B, V, D] of pictures [B, 3, S, S].

        They are the last hidden state too, so that LLaVA's `vision_feature_layer` -1 finds them; the one before is what
        goes into CLIP's last layer.

        Raises:
            ValueError: if the pictures have another size than the config says.
        """
        size = self.config.image_size
        if pixel_values.shape[-2:] != (size, size):
            raise ValueError(f"pictures of {tuple(pixel_values.shape[-2:])} pixels, expected {size}×{size}")
        pixel_values = pixel_values.to(self.dtype)
        slow = self.slow(pixel_values)  # [B, C, h, w]
        fast = self._embed(pixel_values)  # [B, V, D]
        layers = self.encoder.layers
        stage = len(layers) // NUM_STAGES
        side = size // self.config.patch_size
        last = fast
        for i, layer in enumerate(layers):
            if self.adapters and i and i % stage == 0:
                grid = fast.transpose(1, 2).unflatten(2, (side, side))
                fast = self.adapters[i // stage - 1](grid, slow).flatten(2).transpose(1, 2)
            last, fast = fast, layer(fast, None)
        features = self.alignment(fast, slow)
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(last, features))

    @property
    def encoder(self) -> Any:
        """CLIP's encoder, whose `layers` see the patches of the whole picture."""
        return self.fast.encoder

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return what CLIP's first layer gets, [B, V, D]: no class token, the positions resampled."""
        embeddings = self.fast.embeddings
        side = self.config.image_size // self.config.patch_size
        small = F.interpolate(
            pixel_values.float(), size=side * embeddings.patch_size, mode="bilinear", align_corners=True
        )
        patches = embeddings.patch_embedding(small.to(self.dtype))  # [B, D, side, side]
        positions = resampled(embeddings.position_embedding.weight[1:], side)
        return self.fast.pre_layrnorm((patches + positions).flatten(2).transpose(1, 2))
