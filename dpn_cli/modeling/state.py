"""What a batch is between two segments of a pyramid, and what a site decides about it.

Shapes: B batch, L original sequence, S current sequence, D hidden.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
        sizes: [B, S] float, how many tokens each one stands for, 0 for padding; None while each stands for itself, or
            where attention takes no notice of it.
        coords: [B, S, 3] (grid, row, col) of visual tokens, -1 elsewhere; None in a chunk without images.
        salience: [B, S] how much the vision tower attends to every visual token; None where no expert reads it.
        columns: [B, L] where every original token is now; None while nothing has moved.
        instruction: [B] the original column of the last instruction token.
        router_tokens: [B, R] the original columns of the tokens that the routers read, -1 where a sample has fewer.
        grids: Current sizes of the visual grids, per sample; one column after a selection.
        coord_grids: Sizes of the grids that `coords` refer to, per sample; a selection leaves them as they are.
        text_tokens: Number of tokens of the prompt that are not visual, per sample.
        lengths: Number of tokens that are not padding, per sample.
        image_grids: Sizes of the visual grids before any reduction, per sample.
        routes: Experts taken so far, per sample.
        packed: [B, L] (or [1, L]) position ids that start anew where a row holds several samples, else None.
        refusal: why no visual token of this batch may be pooled, or empty.
        angles: the rotary cosines and sines of these positions, if an earlier segment has computed them.
    """

    hidden_states: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None
    sizes: torch.Tensor | None = None
    coords: torch.Tensor | None = None
    salience: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    instruction: torch.Tensor | None = None
    router_tokens: torch.Tensor | None = None
    grids: tuple[tuple[Grid, ...], ...] = ()
    coord_grids: tuple[tuple[Grid, ...], ...] = ()
    text_tokens: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    image_grids: tuple[tuple[Grid, ...], ...] = ()
    routes: tuple[Route, ...] = ()
    packed: torch.Tensor | None = None
    refusal: str = ""
    angles: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def mask(self) -> torch.Tensor | None:
        """What attention has to know of the tokens as keys, [B, S], as `PyramidCache` keeps it; None for nothing."""
        return self.valid if self.sizes is None else self.sizes

    @property
    def is_text(self) -> torch.Tensor:
        """Which tokens are the instruction's and not visual, [B, S] bool."""
        assert self.coords is not None and self.instruction is not None
        last = self.now_at(self.instruction[:, None])
        is_text = (self.coords[..., 0] < 0) & (torch.arange(self.coords.shape[1], device=last.device) <= last)
        return is_text if self.valid is None else is_text & self.valid

    def after(self, hidden_states: torch.Tensor) -> "PyramidState":
        """Return the state after some layers, on the device of their output: layers may be on several devices."""
        return on_device(self, hidden_states.device, hidden_states=hidden_states)

    def rows(self, rows: Sequence[int]) -> "PyramidState":
        """Return some samples of the batch, by their indices."""
        batch, index = len(self.hidden_states), put(rows, self.hidden_states.device)
        chosen: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, torch.Tensor):
                chosen[each.name] = value.expand(batch, *value.shape[1:])[index.to(value.device)]
            elif isinstance(value, tuple) and value and each.name != "angles":
                chosen[each.name] = tuple(value[row] for row in rows)
        return replace(self, **chosen, angles=None)

    def now_at(self, original: torch.Tensor) -> torch.Tensor:
        """Return the current columns, [B, R], of some original columns of every sample."""
        return original if self.columns is None else self.columns.gather(1, original)


def put(values: Any, device: torch.device) -> torch.Tensor:
    """Return host values, a number or nested lists, on a device, without waiting for what it has still to do."""
    return torch.tensor(values).to(device, non_blocking=True)


def on_device(record: Any, device: torch.device, **changes: Any) -> Any:
    """Return a record with its tensors on a device, and some of its fields changed."""
    moved = {
        each.name: value.to(device)
        for each in fields(record)
        if each.name not in changes and isinstance(value := getattr(record, each.name), torch.Tensor)
    }
    return replace(record, **moved, **changes)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Leave autocast out, where there is any; the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def precise(values: torch.Tensor) -> torch.Tensor:
    """Return values in float32, or as they are where they are of more: sums and ranks of halves would be too coarse."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def take_columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return of values [B, S, D] those in some columns [B, Q] of every sample, [B, Q, D]."""
    return values.gather(1, columns[..., None].expand(-1, -1, values.shape[-1]))


@dataclass(frozen=True)
class Choice:
    """What a site takes: one expert index per sample and, for the probability gate, its probability [B]."""

    experts: list[int]
    probability: torch.Tensor | None = None


@dataclass(frozen=True)
class Visible:
    """What a pyramid has to know on the host of the tokens that a batch starts with.

    Attributes:
        coords: [B, S, 3] (grid, row, col) of the visual tokens that are not hidden, -1 elsewhere.
        grids: Sizes of the visual grids, per sample.
        lengths: Number of tokens that are not padding, per sample.
        text_tokens: Number of tokens of the prompt that are not visual, per sample.
        in_part: whether the attention mask hides a part of some grid, and not all of it.
    """

    coords: torch.Tensor
    grids: tuple[tuple[Grid, ...], ...]
    lengths: tuple[int, ...]
    text_tokens: tuple[int, ...]
    in_part: bool

    @property
    def is_padded(self) -> bool:
        """Whether some row has padding."""
        return min(self.lengths) < self.coords.shape[1]


def visible_tokens(coords: torch.Tensor, valid: torch.Tensor | None, prompt: torch.Tensor) -> Visible:
    """Look at a batch, waiting for the device once.

    Args:
        coords: [B, S, 3] (grid, row, col) of visual tokens, -1 elsewhere.
        valid: [B, S] bool, what the attention mask shows; None for all.
        prompt: [B, S] bool, the tokens up to the end of the instruction.
    """
    shown = torch.ones_like(prompt) if valid is None else valid
    host = torch.cat([coords, shown[..., None], prompt[..., None]], dim=-1).cpu()
    places, is_shown, is_prompt = host[..., :3], host[..., 3] > 0, host[..., 4] > 0
    in_part = False
    if ((places[..., 0] >= 0) & ~is_shown).any():
        places, in_part = _without_hidden(places, is_shown)
        coords = places.to(coords.device)
    return Visible(
        coords=coords,
        grids=visual_grids(places),
        lengths=tuple(is_shown.sum(1).tolist()),
        text_tokens=tuple((is_prompt & is_shown & (places[..., 0] < 0)).sum(1).tolist()),
        in_part=in_part,
    )


def _without_hidden(coords: torch.Tensor, shown: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Leave visual tokens out that the attention mask hides, as if they were padding.

    Returns:
        The coordinates of what is left, its grids counted from 0 again; and whether some grid is left in part.
    """
    left = coords.masked_fill(~shown[..., None], -1)
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
        sizes.append(tuple((int(height), int(width)) for height, width in corners))
    return tuple(sizes)
