"""Dropping visual tokens: the tokens with the best scores stay as they are, the others are gone.

Kept tokens and text keep their positions. Rows are re-left-padded to the longest sample, as in pooling.

Shapes: B batch, S sequence, K kept sequence, D hidden.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch

from dpn_cli.evaluation.contenders.contender import Fixed, Prompt, taken_over
from dpn_cli.modeling.state import PyramidState
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import segments_between
from dpn_cli.pyramid.cost import DecoderShape


@dataclass(frozen=True)
class Dropping(Fixed):
    """Keeps the best visual tokens at one or several sites, ranked over all images of a sample together.

    Attributes:
        keep: the share of the visual tokens that is kept at the first site, and at every further one of what is left.
    """

    keep: float = 1.0

    @property
    @abstractmethod
    def after_layers(self) -> tuple[int, ...]:
        """The layers behind which tokens are dropped, -1 for before the first."""

    @abstractmethod
    def scores(self, text_model: Any, state: PyramidState, site: int) -> torch.Tensor:
        """Return what a site ranks tokens by, [B, S]; the scores of text do not matter."""

    def kept(self, visual_tokens: int, site: int) -> int:
        """Return how many of a sample's original visual tokens stay behind a site: at least one."""
        return max(1, round(visual_tokens * self.keep ** (site + 1)))

    def layer_tokens(self, shape: DecoderShape, prompt: Prompt) -> list[int]:
        """Return the visual tokens of every layer."""
        if not prompt.grids:
            return [0] * shape.num_layers
        counts = [prompt.visual_tokens, *(self.kept(prompt.visual_tokens, s) for s in range(len(self.after_layers)))]
        segments = segments_between(self.after_layers, shape.num_layers)
        return [count for count, layers in zip(counts, segments, strict=True) for _ in layers]

    def settings(self, shape: DecoderShape, prompts: Collection[Prompt]) -> list[Self]:
        """Return the keep ratios that are whole tokens of the largest prompt."""
        most = max(prompt.visual_tokens for prompt in prompts)
        return [replace(self, keep=count / most) for count in range(1, most + 1)]

    def applied(self, model: PyramidGenerationMixin) -> AbstractContextManager[None]:
        """Let a model drop tokens for the duration."""
        return taken_over(model, self.after_layers, partial(self.reduce, model.text_model))

    def reduce(self, text_model: Any, state: PyramidState, site: int) -> PyramidState:
        """Drop all but the best visual tokens of every sample."""
        counts = [self.kept(sum(h * w for h, w in grids), site) for grids in state.image_grids]
        return keep_best(state, self.scores(text_model, state, site), counts)


def keep_best(state: PyramidState, scores: torch.Tensor, counts: Sequence[int]) -> PyramidState:
    """Drop all visual tokens but the `counts` best of every sample, by `scores` [B, S]; ties go to the first."""
    assert state.coords is not None
    ranked = scores.masked_fill(state.coords[..., 0] < 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return keep_tokens(state, ranked.argsort(dim=1) < torch.tensor(counts, device=scores.device)[:, None])


def keep_tokens(state: PyramidState, kept: torch.Tensor) -> PyramidState:
    """Drop visual tokens.

    Args:
        state: with visual tokens; its `grids` stay what they were, for no one pools after dropping.
        kept: [B, S] bool; what it says about text and padding is ignored.
    """
    assert state.coords is not None
    kept = kept | (state.coords[..., 0] < 0)
    kept = kept if state.valid is None else kept & state.valid
    lengths = kept.sum(1, keepdim=True)
    longest = int(lengths.max())
    shift = longest - lengths  # left padding
    source = kept.int().argsort(dim=1, stable=True)[:, -longest:]  # the dropped first, the kept in their order
    is_padding = torch.arange(longest, device=kept.device) < shift
    column = (kept.cumsum(1) - 1 + shift).clamp(min=0)  # of a dropped token: that of the kept one before it
    return replace(
        state,
        hidden_states=_gather(state.hidden_states, source),
        positions=state.positions.gather(1, source),
        valid=~is_padding if is_padding.any() else None,
        coords=_gather(state.coords, source).masked_fill(is_padding[..., None], -1),
        columns=column if state.columns is None else column.gather(1, state.columns),
    )


def _gather(values: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return [B, K, D] of [B, S, D]."""
    return values.gather(1, source[..., None].expand(-1, -1, values.shape[-1]))
