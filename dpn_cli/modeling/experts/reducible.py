"""What an expert sees of a batch, and what all selections share.

Shapes: B batch, S sequence, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from dpn_cli.modeling.engine import Assignment, keep_tokens
from dpn_cli.modeling.state import PyramidState, full_precision, precise, put
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.experts import Expert, Grid, num_tokens


@dataclass(frozen=True)
class Reducible:
    """Samples at a site that are given experts of one kind.

    Attributes:
        state: the samples, all with visual tokens.
        experts: one per sample.
        text_model: the decoder, for experts that look at its next layer.
        next_layer: the index of that layer.
    """

    state: PyramidState
    experts: Sequence[Expert]
    text_model: Any
    next_layer: int

    @property
    def coords(self) -> torch.Tensor:
        """The (grid, row, column) of every visual token, [B, S, 3]; -1 elsewhere."""
        assert self.state.coords is not None
        return self.state.coords

    @property
    def pyramid(self) -> PyramidConfig:
        """The pyramid that the experts are of."""
        pyramid: PyramidConfig = self.text_model.pyramid
        return pyramid

    @property
    def is_visual(self) -> torch.Tensor:
        """Which tokens are visual, [B, S] bool."""
        return self.coords[..., 0] >= 0

    @cached_property
    def left(self) -> list[tuple[Grid, ...]]:
        """The grids of every sample afterwards."""
        pairs = zip(self.experts, self.state.grids, strict=True)
        return [expert.left(grids, self.pyramid.rounding) for expert, grids in pairs]

    @cached_property
    def features(self) -> torch.Tensor:
        """The hidden states of length 1, [B, S, D]: their products are cosines."""
        return F.normalize(precise(self.state.hidden_states), dim=-1)

    @property
    def visual_mean(self) -> torch.Tensor:
        """The mean of every sample's visual features, of length 1: [B, 1, D]."""
        return F.normalize((self.features * self.is_visual[..., None]).sum(1, keepdim=True), dim=-1)

    @property
    def salience(self) -> torch.Tensor:
        """How much the vision tower attends to every token, [B, S]."""
        assert self.state.salience is not None
        return self.state.salience

    @property
    def num_selected(self) -> list[int]:
        """How many visual tokens every sample's selection lets stay."""
        return [expert.selected(grids) for expert, grids in zip(self.experts, self.state.grids, strict=True)]

    def lengths(self) -> list[int]:
        """Return how many tokens every sample has afterwards."""
        parts = zip(self.state.lengths, self.state.grids, self.left, strict=True)
        return [count - num_tokens(old) + num_tokens(new) for count, old, new in parts]

    def keep(self, kept: torch.Tensor) -> Assignment:
        """Let some visual tokens, [B, S] bool, stay as they are and drop the others; text stays."""
        return keep_tokens(self.state, kept & self.is_visual, self.lengths())

    def best(self, scores: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor:
        """Return which visual tokens have the best scores [B, S]; ties go to the first.

        Args:
            scores: of all tokens.
            counts: how many of every sample; by default as many as are selected.
        """
        counts = self.num_selected if counts is None else counts
        return ranks(scores.masked_fill(~self.is_visual, -torch.inf)) < put(counts, scores.device)[:, None]


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the products [..., N, M] of vectors of length 1, in steps of 1 / 4096.

    So tokens that are alike tie in whatever batch they are, and the first one is taken; and sums of cosines are exact.
    """
    with full_precision(a.device):
        return (a @ b.transpose(-1, -2) * 4096).round() / 4096


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Return the place of every score [..., N] by falling score; ties go to the first."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
