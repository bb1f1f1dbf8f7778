"""Fewer visual tokens from the start: the language model sees a coarser grid.

A token of the coarse grid stands in the middle of what it covers, as a pooled token of a pyramid does: on the demo's
teacher and on LLaVA the rows of a grid are told apart by their distance, which numbering anew would change.

Shapes: B batch, S sequence, I images, N visual tokens of an image, D hidden.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dpn_cli.errors import UsageError
from dpn_cli.evaluation.baselines.baseline import Fitted, Prompt
from dpn_cli.modeling.configuration import DpnLlavaConfig
from dpn_cli.modeling.engine import compact, keep_tokens
from dpn_cli.modeling.state import PyramidState
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.experts import KEEP, Grid, num_tokens
from dpn_cli.pyramid.shape import DecoderShape

BEFORE_THE_FIRST_LAYER = PyramidConfig((Site(-1, (KEEP,)),), static_route=(0,))


@dataclass(frozen=True)
class Coarser(Fitted):
    """Gives the language model a coarser grid of every image.

    The surplus image tokens of the prompt, after the real ones of their image, are dropped before the first layer.

    Attributes:
        size: the coarse grid (h, w); None for the model's own.
    """

    size: Grid | None = None

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name if self.size is None else f"{self.name} {self.size[0]}×{self.size[1]}"

    @abstractmethod
    def hook(self, model: PyramidGenerationMixin, size: Grid) -> RemovableHandle:
        """Let the model make a coarse grid of an image."""

    def layer_tokens(self, shape: DecoderShape, prompt: Prompt) -> list[int]:
        """Return the visual tokens of every layer."""
        count = prompt.visual_tokens if self.size is None else num_tokens([self.size] * len(prompt.grids))
        return [count] * shape.num_layers

    def settings(self, shape: DecoderShape, prompts: Collection[Prompt]) -> list[Self]:
        """Return all coarser grids of about the same shape, and the full one."""
        grids = {grid for prompt in prompts for grid in prompt.grids}
        if len(grids) != 1:
            raise ValueError(f"{self.name} needs images that are not cut into tiles")
        [(height, width)] = grids
        sizes = {
            (h, w)
            for h in range(1, height + 1)
            for w in (round(h * width / height) + step for step in (-1, 0, 1))
            if 1 <= w <= width
        }
        return [replace(self, size=size) for size in sorted(sizes, key=lambda size: num_tokens([size]))]

    @contextmanager
    def applied(self, model: PyramidGenerationMixin) -> Iterator[None]:
        """Let a model see coarser images for the duration.

        Raises:
            UsageError: if its vision tower cannot.
        """
        grid = model.model.image_grid()
        size = self.size or grid
        _validate_clip(model, self.name)
        hooks = [self.hook(model, size), _pad_features(model, grid)] if size != grid else []
        try:
            with (
                model.without_adapter(),
                model.as_pyramid(BEFORE_THE_FIRST_LAYER),
                model.reduced_by(lambda state, site: _shrink(state, grid, size)),
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()


class ImageDownsampling(Coarser):
    """Makes the image smaller, so that the vision tower gives fewer patches.

    Source: the baseline of VTC-Bench, https://arxiv.org/abs/2510.07143. Ours: a tower of fixed size takes the smaller
    image through interpolated position embeddings (`interpolate_pos_encoding` of transformers). What the tower saves
    beside is not counted.
    """

    name: ClassVar[str] = "downsample"

    def hook(self, model: PyramidGenerationMixin, size: Grid) -> RemovableHandle:
        """Resize what goes into the vision tower."""
        patch = model.config.vision_config.patch_size

        def resize(_: Any, args: tuple[torch.Tensor], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
            pixels = args[0] if args else kwargs["pixel_values"]
            target = (size[0] * patch, size[1] * patch)
            small = F.interpolate(pixels.float(), target, mode="bicubic", antialias=True).to(pixels.dtype)
            return (), {**kwargs, "pixel_values": small, "interpolate_pos_encoding": True}

        return model.model.vision_tower.register_forward_pre_hook(resize, with_kwargs=True)


class FeaturePooling(Coarser):
    """Averages the vision tower's features before the projector; the tower sees the whole image.

    Source: the one-stage pooling of LLaVolta, https://arxiv.org/abs/2406.20092, moved before the language model.
    """

    name: ClassVar[str] = "prepool"

    def hook(self, model: PyramidGenerationMixin, size: Grid) -> RemovableHandle:
        """Pool what goes into the projector."""
        grid = model.model.image_grid()

        def pool(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            pooled = F.adaptive_avg_pool2d(args[0].transpose(1, 2).unflatten(2, grid), size)
            return (pooled.flatten(2).transpose(1, 2),)

        return model.model.multi_modal_projector.register_forward_pre_hook(pool)


def _validate_clip(model: PyramidGenerationMixin, name: str) -> None:
    """Check that an image is one grid of patches of a CLIP vision tower, with its class token.

    Raises:
        UsageError: naming the baseline that needs it.
    """
    is_clip = model.config.vision_config.model_type == "clip_vision_model"
    if not is_clip or model.config.model_type != DpnLlavaConfig.model_type or model.pyramid.prepooling != 1:
        raise UsageError(f"{name} needs a LLaVA-1.5: a CLIP vision tower whose patches go on one by one")


def _pad_features(model: PyramidGenerationMixin, grid: Grid) -> RemovableHandle:
    """Give every image as many features as the prompt has places for, the surplus zero."""

    def pad(_: Any, args: Any, features: torch.Tensor) -> torch.Tensor:
        return F.pad(features, (0, 0, 0, num_tokens([grid]) - features.shape[1]))

    return model.model.multi_modal_projector.register_forward_hook(pad)


def _shrink(state: PyramidState, grid: Grid, size: Grid) -> PyramidState:
    """Leave the first h·w visual tokens of every image, as a coarse grid over the same area."""
    assert state.coords is not None
    is_visual = state.coords[..., 0] >= 0
    index = state.coords[..., 1] * grid[1] + state.coords[..., 2]  # place within the image
    row, column = index // size[1], index % size[1]
    middle = [(place + 0.5) * old / new - 0.5 for place, old, new in zip((row, column), grid, size, strict=True)]
    positions = torch.where(is_visual, state.positions - index + middle[0] * grid[1] + middle[1], state.positions)
    coords = torch.where(is_visual[..., None], torch.stack([state.coords[..., 0], row, column], -1), -1)
    state = replace(state, positions=positions, coords=coords)
    return compact(state, keep_tokens(state, index < num_tokens([size])))
