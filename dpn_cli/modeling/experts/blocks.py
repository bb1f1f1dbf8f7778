"""Blocks of an image, laid side by side, so that tokens are compared and chosen in all of them at once.

Shapes: B batch, S sequence, D hidden, N blocks of a sample at most, M tokens of a block at most.
"""

import math
from collections.abc import Sequence

import torch

from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.state import put
from dpn_cli.pyramid.experts import BLOCK, Grid, num_tokens

SURPLUS = 1.25


class Blocks:
    """The visual tokens of a batch by blocks: halves of a grid's sides, but no larger than `BLOCK` on a side; ours.

    Attributes:
        is_token: [B, N, M] bool, which places of the blocks hold a token.
        num_steps: Number of tokens to rank in a block, per sample: more than the block's share, for busy blocks.
    """

    def __init__(self, batch: Reducible) -> None:
        """Lay the tokens out."""
        device, grids = batch.coords.device, batch.state.coord_grids
        plans = [_plan(sample) for sample in grids]
        width = max(map(len, plans))
        plan = put([[*rows, *[(0, 1, 1, 1)] * (width - len(rows))] for rows in plans], device)
        self.num_blocks = max(sum(_num_blocks(grid) for grid in sample) for sample in grids)
        sizes = [max(math.prod(_sides(grid)) for grid in sample) for sample in grids]
        self.size = max(sizes)

        grid, cell = batch.coords[..., 0].clamp(min=0), batch.coords[..., 1:]
        offset, across, *sides = plan.gather(1, grid[..., None].expand(-1, -1, 4)).unbind(-1)  # [B, S] each
        block = offset + cell[..., 0] // sides[0] * across + cell[..., 1] // sides[1]
        block = torch.where(batch.is_visual, block, self.num_blocks)
        ones = batch.is_visual.long()
        counts = torch.zeros(len(block), self.num_blocks + 1, dtype=torch.long, device=device).scatter_add(
            1, block, ones
        )
        start = counts.cumsum(1) - counts
        place = block.argsort(dim=1, stable=True).argsort(dim=1) - start.gather(1, block)
        self.is_token = torch.arange(self.size, device=device) < counts[:, :-1, None]
        self.slot = torch.where(batch.is_visual, block * self.size + place, self.num_blocks * self.size)
        column = torch.arange(block.shape[1], device=device).expand_as(block)
        table = torch.zeros(len(block), self.num_blocks * self.size + 1, dtype=torch.long, device=device)
        self.table = table.scatter(1, self.slot, column)[:, :-1]
        shares = [e.selected(g) / num_tokens(g) for e, g in zip(batch.experts, batch.state.grids, strict=True)]
        steps = zip(sizes, shares, strict=True)
        self.num_steps = [min(size, math.ceil(SURPLUS * share * size)) for size, share in steps]

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return values [B, S, D] by blocks, [B, N, M, D]; anything where there is no token."""
        rows = values.gather(1, self.table[..., None].expand(-1, -1, values.shape[-1]))
        return rows.unflatten(1, (self.num_blocks, self.size))

    def scores(self, chosen: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what tokens were chosen at, [B, S]; -1 for the others.

        Args:
            chosen: Place that each step chose in every block, [B, N, 1].
            values: Score that each step's place had when it was chosen.
        """
        steps = put(self.num_steps, self.slot.device)
        counts = torch.arange(len(chosen), device=self.slot.device) < steps[:, None, None]
        value = torch.where(counts, torch.cat(list(values), -1), -1)
        scores = torch.full(self.is_token.shape, -1, dtype=value.dtype, device=value.device)
        scores = scores.scatter_reduce(-1, torch.cat(list(chosen), -1), value, "amax").flatten(1)
        return torch.cat([scores, scores.new_full((len(scores), 1), -1)], dim=1).gather(1, self.slot)


def _sides(grid: Grid) -> Grid:
    """Return the size of a grid's blocks."""
    height, width = (min(BLOCK, -(-side // 2)) for side in grid)
    return height, width


def _across(grid: Grid) -> Grid:
    """Return how many blocks a grid has, down and across."""
    rows, columns = (-(-side // block) for side, block in zip(grid, _sides(grid), strict=True))
    return rows, columns


def _num_blocks(grid: Grid) -> int:
    return math.prod(_across(grid))


def _plan(grids: Sequence[Grid]) -> list[tuple[int, int, int, int]]:
    """Return of every grid its first block, how many it has across, and their height and width."""
    plan, first = [], 0
    for grid in grids:
        plan.append((first, _across(grid)[1], *_sides(grid)))
        first += _num_blocks(grid)
    return plan
