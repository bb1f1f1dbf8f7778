"""What a batch is between two segments of a pyramid, and what a site decides about it.

Shapes: B batch, L original sequence, S current sequence, D hidden.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from dpn_cli.pyramid.config import Route
from dpn_cli.pyramid.experts import Grid

PACKED = (
    "rows that hold several samples one after another (position ids that start anew) cannot be pooled: give every "
    "sample a row of its own, padded, with an attention mask"
)
HIDDEN_IN_PART = (
    "the attention mask hides a part of an image, whose cells cannot be pooled: hide all of its tokens, or none"
)


@dataclass(frozen=True)
class PyramidState:
    """A batch between two segments.

    Attributes:
        hidden_states: [B, S, D].
        positions: [B, S] (or [1, S]) rotary positions; those of merged tokens may be fractions.
        valid: [B, S] bool, or None when no row of this chunk is padded.
        coords: [B, S, 3] (grid, row, col) of visual tokens, -1 elsewhere; None in a chunk without images.
        columns: [B, L] where every original token is now; None while nothing has moved.
        instruction: [B] the original column of the last instruction token.
        router_tokens: [B, R] the original columns of the tokens that the routers read, -1 where a sample has fewer.
        grids: per sample, the current sizes of its visual grids; one column after a selection.
        coord_grids: per sample, the sizes of the grids that `coords` refer to, which a selection leaves as they are.
        text_tokens: per sample, the tokens of the prompt that are not visual.
        image_grids: per sample, the sizes of its grids before any pooling.
        routes: per sample, the experts taken so far.
        packed: [B, L] (or [1, L]) position ids that start anew where a row holds several samples, else None.
        refusal: why no visual token of this batch may be pooled, or empty.
    """

    hidden_states: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None
    coords: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    instruction: torch.Tensor | None = None
    router_tokens: torch.Tensor | None = None
    grids: tuple[tuple[Grid, ...], ...] = ()
    coord_grids: tuple[tuple[Grid, ...], ...] = ()
    text_tokens: tuple[int, ...] = ()
    image_grids: tuple[tuple[Grid, ...], ...] = ()
    routes: tuple[Route, ...] = ()
    packed: torch.Tensor | None = None
    refusal: str = ""

    def after(self, hidden_states: torch.Tensor) -> "PyramidState":
        """Return the state after some layers, on the device of their output: layers may be on several devices."""
        moved: dict[str, Any] = {
            each.name: value.to(hidden_states.device)
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), torch.Tensor)
        }
        return replace(self, **{**moved, "hidden_states": hidden_states})

    def rows(self, index: torch.Tensor) -> "PyramidState":
        """Return some samples of the batch, by their indices."""
        batch = len(self.hidden_states)
        chosen: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, torch.Tensor):
                chosen[each.name] = value.expand(batch, *value.shape[1:])[index.to(value.device)]
            elif isinstance(value, tuple) and value:
                chosen[each.name] = tuple(value[row] for row in index.tolist())
        return replace(self, **chosen)

    def now_at(self, original: torch.Tensor) -> torch.Tensor:
        """Return the current columns, [B, R], of some original columns of every sample."""
        return original if self.columns is None else self.columns.gather(1, original)


def precise(values: torch.Tensor) -> torch.Tensor:
    """Return values in float32, or as they are where they are of more: sums and ranks of halves would be too coarse."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class Choice:
    """What a site takes: one expert index per sample and, for the probability gate, its probability [B]."""

    experts: list[int]
    probability: torch.Tensor | None = None


def without_hidden(coords: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, bool]:
    """Leave visual tokens out that the attention mask hides, as if they were padding.

    Args:
        coords: [B, S, 3] (grid, row, col) of visual tokens, -1 elsewhere.
        valid: [B, S] bool, or None when nothing is hidden.

    Returns:
        The coordinates of what is left, its grids counted from 0 again; and whether some grid is left in part.
    """
    is_visual = coords[..., 0] >= 0
    if valid is None or not (is_visual & ~valid).any():
        return coords, False
    left = coords.masked_fill(~valid[..., None], -1)
    in_part = False
    for whole, rest in zip(coords, left, strict=True):
        kept = rest[rest[:, 0] >= 0, 0].unique()
        in_part |= any((whole[:, 0] == grid).sum() != (rest[:, 0] == grid).sum() for grid in kept)
        rest[:, 0] = torch.where(rest[:, 0] >= 0, torch.searchsorted(kept, rest[:, 0].contiguous()), -1)
    return left, in_part


def visual_grids(coords: torch.Tensor) -> tuple[tuple[Grid, ...], ...]:
    """Read every sample's grid sizes from its visual coordinates [B, S, 3]."""
    sizes = []
    for sample in coords.cpu():
        count = int(sample[:, 0].max()) + 1
        corners = [sample[sample[:, 0] == g][:, 1:].amax(0) + 1 for g in range(count)]
        sizes.append(tuple((int(h), int(w)) for h, w in corners))
    return tuple(sizes)
