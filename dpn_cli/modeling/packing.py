"""Running the rows of a batch as one row without padding, so that no linear layer works on padding; ours.

The routes of a batch leave its rows with very different numbers of tokens: padded to the longest, the rows that were
pooled most would gain nothing. Packed one after another they need no padding where a layer looks at every token by
itself. Only attention lays them out again, in groups of rows of similar lengths.

Shapes: B batch, S sequence, T tokens of all rows together and a few arbitrary ones, see `rounded`; b rows of a group,
n their tokens, k those of its longest row; H heads, D hidden or head size.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from dpn_cli.modeling.state import on_device, put

KERNEL = "sdpa"
"""The attention implementation that can be given packed rows."""

MOVE_COST = {"cpu": 64, "cuda": 256}
"""How many tokens of padding cost a layer as much as packing rows and laying them out, by type of device."""

CALL_COST = {"cpu": 64, "cuda": 1024}
"""Length of a row whose attention costs as much as one more call, for one more group, by type of device."""


@dataclass(frozen=True)
class Group:
    """Rows whose attention is computed in one call.

    Attributes:
        rows: their places in the batch; None for all rows, in their order.
        count: number of rows, b.
        longest: number of tokens of the longest row, k.
        span: where their tokens lie in the packed row.
        places: [n] where their tokens lie when they are laid out, padded on the left; None when no row is padded.
        tokens: [b·k] which packed token lies where then, an arbitrary one for padding; None when no row is
            padded.
        mask: what attention has to know of them, [b, 1, k, k]; None where each token sees all before it.
    """

    rows: torch.Tensor | None
    count: int
    longest: int
    span: slice
    places: torch.Tensor | None
    tokens: torch.Tensor | None
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[int], lengths: Sequence[int], start: int, device: torch.device) -> Self:
        """Group rows of a batch with such lengths, which begin at a place in the packed row."""
        own = [lengths[row] for row in rows]
        longest, span = max(own), slice(start, start + sum(own))
        index = None if len(rows) == len(lengths) else put(list(rows), device)
        if len(set(own)) == 1:
            return cls(index, len(rows), longest, span, None, None)
        places = _places(range(len(rows)), own, longest)
        tokens = _inverse(places, len(rows) * longest, start)
        return cls(index, len(rows), longest, span, _send(places, device), _send(tokens, device))

    def of_batch(self, values: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Return the group's part of what lies in the batch as [B, …, S, …], S in a dimension."""
        own = values if self.rows is None else values.index_select(0, self.rows)
        return own.narrow(dim, own.shape[dim] - self.longest, self.longest)

    def lay_out(self, values: torch.Tensor) -> torch.Tensor:
        """Return of packed values [1, H, T, D] those of the group, [b, H, k, D]."""
        tokens = values[0].transpose(0, 1)
        own = tokens[self.span] if self.tokens is None else tokens.index_select(0, self.tokens)
        return own.unflatten(0, (self.count, self.longest)).transpose(1, 2)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Return the tokens [n, H, D] of what is laid out as [b, H, k, D]."""
        tokens = values.transpose(1, 2).flatten(0, 1)
        return tokens if self.places is None else tokens.index_select(0, self.places)


@dataclass(frozen=True)
class Packing:
    """How the rows of a batch, padded on the left, lie one after another.

    Attributes:
        groups: the rows in the order in which they are packed.
        shape: B and S.
        places: [T] where in the batch every packed token lies, of B·S; the first place for arbitrary ones.
        tokens: [B·S] which packed token lies where in the batch, an arbitrary one for padding.
    """

    groups: Sequence[Group]
    shape: tuple[int, int]
    places: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], length: int, device: torch.device) -> Self:
        """Pack rows with so many tokens each, padded to a length."""
        split = split_by_length(lengths, _of_type(CALL_COST, device))
        groups: list[Group] = []
        for rows in split:
            groups.append(Group.of(rows, lengths, groups[-1].span.stop if groups else 0, device))
        order = [row for rows in split for row in rows]
        places = _places(order, [lengths[row] for row in order], length)
        tokens = _inverse(places, len(lengths) * length)
        places = pad(places, (0, rounded(len(places)) - len(places)))
        return cls(groups, (len(lengths), length), _send(places, device), _send(tokens, device))

    @staticmethod
    def pays(lengths: Sequence[int], length: int, device: torch.device) -> bool:
        """Say whether rows with so many tokens each, padded to a length, should be packed."""
        padding = len(lengths) * length - sum(lengths)
        return padding > _of_type(MOVE_COST, device) and any(lengths)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Return the tokens of values [B, S, …] in one row, [1, T, …]."""
        return values.flatten(0, 1).index_select(0, self.places.to(values.device))[None]

    def lay_out(self, values: torch.Tensor) -> torch.Tensor:
        """Return packed values [1, T, …] as they lie in the batch, [B, S, …]; anything where there is padding."""
        return values[0].index_select(0, self.tokens.to(values.device)).unflatten(0, self.shape)

    def lay_out_heads(self, values: torch.Tensor) -> torch.Tensor:
        """Return packed values [1, H, T, D] as they lie in the batch, [B, H, S, D]."""
        return self.lay_out(values.transpose(1, 2)).transpose(1, 2)

    def mask(self, mask_of: Callable[[Group], torch.Tensor | None]) -> "PackedMask":
        """Return the attention mask of the packed row, from those of its groups."""
        return PackedMask(replace(self, groups=[replace(group, mask=mask_of(group)) for group in self.groups]))

    def to(self, device: torch.device) -> "Packing":
        """Return the packing, and all that is in it, on a device."""
        return on_device(self, device, groups=[on_device(group, device) for group in self.groups])


class PackedMask(torch.Tensor):
    """A mask with which PyTorch's fused attention computes that of packed rows, group by group.

    It holds no numbers. Like `torch.nn.attention.bias.CausalBias`, it is asked by the function that it is given to.
    """

    packing: Packing

    def __new__(cls, packing: Packing) -> Self:
        """Make the mask of a packing whose groups have theirs."""
        mask = torch.empty(0, dtype=torch.bool).as_subclass(cls)
        mask.packing = packing
        return mask

    def to(self, *args: Any, **kwargs: Any) -> "PackedMask":
        """Return the mask on a device, as hooks ask for where layers are on several; a dtype is ignored."""
        return PackedMask(self.packing.to(self.packing.places.to(*args, **kwargs).device))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Compute fused attention; do anything else as with an empty tensor."""
        if func is scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: PackedMask, **options: Any
) -> torch.Tensor:
    """Return the attention output [1, H, T, D] of packed queries; a cache has laid keys and values out already."""
    packing, outputs = attn_mask.packing, []
    if (key.shape[0], key.shape[2]) != packing.shape:
        key, value = packing.lay_out_heads(key), packing.lay_out_heads(value)
    for group in packing.groups:
        states = (group.lay_out(query), group.of_batch(key, dim=2), group.of_batch(value, dim=2))
        own: dict[str, Any] = {**options, "attn_mask": group.mask, "is_causal": group.mask is None}
        outputs.append(group.pack(scaled_dot_product_attention(*states, **own)))
    packed = torch.cat(outputs)
    return pad(packed, (0, 0, 0, 0, 0, query.shape[2] - len(packed))).transpose(0, 1)[None]


def rounded(count: int) -> int:
    """Return the next number of tokens of which there are 32 between a power of two and the next.

    For every new one PyTorch's linear layers prepare a kernel on a CPU, and keep it: hundreds of MB if all are new.
    """
    step = max(1, (1 << count.bit_length()) >> 6)
    return -(-count // step) * step


def split_by_length(lengths: Sequence[int], call_cost: int) -> list[list[int]]:
    """Split rows into the groups whose attention takes the least work; ours.

    A group works on its rows times the square of its longest length. Rows of neighbouring lengths go together, so that
    a dynamic programme over the sorted rows finds the best split.

    Args:
        lengths: tokens of every row.
        call_cost: Length of a row whose attention costs as much as one more group.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    work, starts = [0], []  # of the first n rows: the least work, and where the last group starts then
    for stop in range(1, len(order) + 1):
        totals = [work[start] + (stop - start) * lengths[order[start]] ** 2 + call_cost**2 for start in range(stop)]
        work.append(min(totals))
        starts.append(totals.index(work[-1]))
    groups, stop = [], len(order)
    while stop:
        groups.append(sorted(order[starts[stop - 1] : stop]))
        stop = starts[stop - 1]
    return groups[::-1]


def _places(rows: Sequence[int], lengths: Sequence[int], width: int) -> torch.Tensor:
    """Return where the tokens of rows, of such lengths, lie in a batch that is padded on the left to a width."""
    shifts = [(row + 1) * width - total for row, total in zip(rows, accumulate(lengths), strict=True)]
    total = sum(lengths)
    return torch.arange(total) + torch.tensor(shifts).repeat_interleave(torch.tensor(lengths), output_size=total)


def _inverse(places: torch.Tensor, size: int, first: int = 0) -> torch.Tensor:
    """Return which token lies at every one of so many places, counted from the first; the first where none does."""
    return torch.full((size,), first).index_copy(0, places, torch.arange(first, first + len(places)))


def _of_type(costs: dict[str, int], device: torch.device) -> int:
    """Return the cost on a device; all that are no CPU are taken for a GPU."""
    return costs.get(device.type, costs["cuda"])


def _send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values on a device, without waiting for what it has still to do."""
    return values.to(device, non_blocking=True)
