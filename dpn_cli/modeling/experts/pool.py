"""`pool`: every cell of a grid becomes one token, its mean (or maximum, or a learned sum).

A *cell* is the kernel_h × kernel_w block of one grid that becomes one token; it stands where its first token stood.
Every text token is a cell of its own.

Source: paper, section 3.2.

Shapes: B batch, S sequence, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import nn

from dpn_cli.modeling.engine import DROPPED, Assignment
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.state import put
from dpn_cli.pyramid.experts import Expert, pool_grid


def pooled_cells(batch: Reducible) -> Assignment:
    """Let every token go into the first one of its cell, or be dropped where incomplete cells are (`floor`)."""
    grid, token = batch.coords[..., 0], batch.coords[..., 1:]
    rows, length = grid.shape
    index = torch.arange(length, device=grid.device).expand(rows, -1)
    rates = [expert.cells or (1, 1) for expert in batch.experts]
    pooled = [
        [pool_grid(size, rate, batch.pyramid.rounding) for size in sizes]
        for sizes, rate in zip(batch.state.coord_grids, rates, strict=True)
    ]
    cell = torch.where(batch.is_visual[..., None], token // put(rates, grid.device)[:, None], 0)  # [B, S, 2]
    num_grids = max(1, *map(len, pooled))
    sizes = [[*sample, *[(0, 0)] * (num_grids - len(sample))] for sample in pooled]
    size = put(sizes, grid.device).gather(1, grid.clamp(min=0)[..., None].expand(-1, -1, 2))
    kept = ~batch.is_visual | (cell < size).all(-1)
    kept = kept if batch.state.valid is None else kept & batch.state.valid

    span = max((max(size) for sample in batch.state.coord_grids for size in sample), default=1)
    key = torch.where(batch.is_visual, length + (grid * span + cell[..., 0]) * span + cell[..., 1], index)
    first = torch.full((rows, length + num_grids * span * span), length, device=grid.device)
    first = first.scatter_reduce(1, key, torch.where(kept, index, length), "amin").gather(1, key)
    return Assignment(
        target=torch.where(kept, first, DROPPED),
        coords=torch.where(batch.is_visual[..., None], torch.cat([grid[..., None], cell], -1), -1),
        lengths=batch.lengths(),
        merges=True,
    )


def best_of_cells(cells: Assignment, scores: torch.Tensor) -> torch.Tensor:
    """Return, for every token, the column [B, S] of the best token of its cell by `scores` [B, S]; the first of equals.

    Args:
        cells: Cells that `pooled_cells` made; a token that it drops is a cell of its own.
        scores: Finite scores.
    """
    index = torch.arange(scores.shape[1], device=scores.device)
    cell = torch.where(cells.target == DROPPED, index, cells.target)
    best = torch.full_like(scores, -torch.inf).scatter_reduce(1, cell, scores, "amax").gather(1, cell)
    column = torch.where(scores == best, index, len(index))
    first = torch.full_like(cell, len(index)).scatter_reduce(1, cell, column, "amin", include_self=False)
    return first.gather(1, cell)


class Kernels(nn.Module):
    """The depthwise convolutions of one site, [D, kernel_h, kernel_w] per expert; they start as averages."""

    def __init__(self, hidden_size: int, experts: Sequence[Expert]) -> None:
        super().__init__()
        for k, (h, w) in enumerate(expert.cells or (1, 1) for expert in experts):
            self.register_parameter(str(k), nn.Parameter(torch.full((hidden_size, h, w), 1 / (h * w))))

    def forward(self, expert: int) -> torch.Tensor:
        """Return the kernel of an expert; a call, so that hooks which load weights (offloading) run."""
        return self.get_parameter(str(expert))
