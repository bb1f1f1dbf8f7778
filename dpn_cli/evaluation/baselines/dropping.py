"""Dropping visual tokens: the tokens with the best scores stay as they are, the others are gone.

Kept tokens and text keep their positions.

Shapes: B batch, S sequence.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch

from dpn_cli.evaluation.baselines.contender import Fixed, Prompt, taken_over
from dpn_cli.modeling.engine import compact, keep_tokens
from dpn_cli.modeling.state import PyramidState
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import num_tokens, segments_between
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
        """The layers after which tokens are dropped, -1 for before the first."""

    @abstractmethod
    def scores(self, text_model: Any, state: PyramidState, site: int) -> torch.Tensor:
        """Return what a site ranks tokens by, [B, S]; the scores of text do not matter."""

    def kept(self, visual_tokens: int, site: int) -> int:
        """Return how many of a sample's original visual tokens stay after a site: at least one."""
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
        counts = [self.kept(num_tokens(grids), site) for grids in state.image_grids]
        return keep_best(state, self.scores(text_model, state, site), counts)


def keep_best(state: PyramidState, scores: torch.Tensor, counts: Sequence[int]) -> PyramidState:
    """Drop all visual tokens but the `counts` best of every sample, by `scores` [B, S]; ties go to the first.

    `grids` stay what they were, for no one pools after dropping.
    """
    assert state.coords is not None
    ranked = scores.masked_fill(state.coords[..., 0] < 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    kept = ranked.argsort(dim=1) < torch.tensor(counts, device=scores.device)[:, None]
    return compact(state, keep_tokens(state, kept))
