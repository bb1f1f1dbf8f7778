"""The engine of everything that leaves a batch with fewer tokens: an assignment says which token goes where.

A method of reduction (pooling, dropping, merging) only builds the assignment; `compact` applies it to a batch. What
is left keeps its order, and rows are re-left-padded to the longest sample.

Shapes: B batch, L original sequence, S sequence before, K sequence after, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dpn_cli.modeling.state import PyramidState, precise, put

DROPPED = -1


@dataclass(frozen=True)
class Assignment:
    """Which token goes where: each one stays, is merged into one that stays, or is dropped.

    Attributes:
        target: [B, S] long, the column of the token that a token goes into: its own if it stays, `DROPPED` if it is
            dropped. Padding is always dropped. A target must itself stay.
        coords: [B, S, 3] the (grid, row, col) that every token has afterwards, read where one stays; None if tokens
            keep those that they have.
        lengths: Number of tokens that stay, per sample; None to count them, which waits for the device.
        merges: Whether some tokens may be merged into others.
    """

    target: torch.Tensor
    coords: torch.Tensor | None = None
    lengths: Sequence[int] | None = None
    merges: bool = False


def keep_tokens(state: PyramidState, kept: torch.Tensor, lengths: Sequence[int] | None = None) -> Assignment:
    """Let some visual tokens stay as they are and drop the others.

    Args:
        state: a batch with visual tokens.
        kept: [B, S] bool; what it says about text and padding is ignored.
        lengths: how many tokens stay per sample, where it is known.
    """
    assert state.coords is not None
    kept = kept | (state.coords[..., 0] < 0)
    kept = kept if state.valid is None else kept & state.valid
    return Assignment(torch.where(kept, torch.arange(kept.shape[1], device=kept.device), DROPPED), lengths=lengths)


def compact(
    state: PyramidState,
    assignment: Assignment,
    mode: Literal["avg", "max"] = "avg",
    weights: torch.Tensor | None = None,
    sized: bool = False,
) -> PyramidState:
    """Apply an assignment to a batch: its hidden states, positions, coordinates, salience, columns and padding.

    The column of a dropped token is that of the one that stays before it. `grids` and `routes` are left as they are.

    Args:
        state: State that has visual tokens.
        assignment: Where each of its tokens goes.
        mode: whether tokens that go into one become their mean or their maximum; their position is always the mean.
        weights: [B, S, 1 or D] what tokens are multiplied by before the mean.
        sized: Whether to count how many tokens each one stands for.

    Raises:
        ValueError: if no visual token of this batch may be merged or dropped, see `PyramidState.refusal`.
    """
    if state.refusal:
        raise ValueError(state.refusal)
    assert state.coords is not None
    target = assignment.target
    batch, length = target.shape
    index = torch.arange(length, device=target.device)
    stays = target == index
    lengths = stays.sum(1).tolist() if assignment.lengths is None else assignment.lengths
    longest = max(lengths)
    shift = longest - put(lengths, target.device)[:, None]  # [B, 1], left padding
    column = stays.cumsum(1) - 1 + shift  # of a token that stays; elsewhere, of the one that stays before it
    column = column.gather(1, torch.where(target == DROPPED, index, target)).clamp(min=0)

    first = torch.arange(batch, device=target.device)[:, None] * longest
    trash = batch * longest  # one row more than there are, for what is dropped
    place = torch.where(target == DROPPED, trash, first + column)
    coords = state.coords if assignment.coords is None else assignment.coords
    new_coords = coords.new_full((trash + 1, 3), -1)
    new_coords[torch.where(stays, place, trash)] = coords

    def merged(values: torch.Tensor, mode: Literal["avg", "max"] = "avg") -> torch.Tensor:
        flat = values.flatten(0, 1)
        if assignment.merges:
            flat = _merge(precise(flat), place.flatten(), trash, mode).to(values.dtype)
        else:
            flat = flat.new_zeros(trash + 1, flat.shape[1]).index_copy(0, place.flatten(), flat)[:trash]
        return flat.view(batch, longest, -1)

    sizes = state.sizes
    if sized and (assignment.merges or sizes is not None):
        sizes = state.positions.new_ones(batch, length) if sizes is None else sizes
        sizes = sizes.new_zeros(trash + 1).index_add(0, place.flatten(), sizes.flatten())[:trash].view(batch, longest)
    hidden_states = state.hidden_states if weights is None else precise(state.hidden_states) * weights
    return replace(
        state,
        hidden_states=merged(hidden_states, mode).to(state.hidden_states.dtype),
        positions=merged(state.positions[..., None])[..., 0],
        salience=None if state.salience is None else merged(state.salience[..., None])[..., 0],
        sizes=sizes,
        valid=torch.arange(longest, device=target.device) >= shift if len(set(lengths)) > 1 else None,
        coords=new_coords[:trash].view(batch, longest, 3),
        columns=column if state.columns is None else column.gather(1, state.columns),
        lengths=tuple(lengths),
        angles=None,
    )


def _merge(values: torch.Tensor, place: torch.Tensor, count: int, mode: Literal["avg", "max"]) -> torch.Tensor:
    """Reduce the rows of [N, D] that share a place to one.

    Args:
        values: Rows to reduce, [N, D].
        place: [N] the row of the result that a row goes into; `count` for none.
        count: rows of the result; those that nothing goes into are zero.
    """
    out = values.new_zeros(count + 1, values.shape[1])
    if mode == "max":
        return out.scatter_reduce(0, place[:, None].expand_as(values), values, "amax", include_self=False)[:count]
    members = values.new_zeros(count + 1).index_add(0, place, values.new_ones(len(place)))[:count]
    return out.index_add(0, place, values)[:count] * (1 / members.clamp(min=1))[:, None]
