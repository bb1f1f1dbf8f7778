"""Pooling of visual tokens in a ragged batch: every sample at its own rate, text untouched.

A *cell* is the kernel_h × kernel_w block of one grid that becomes one token; it stands where its first token stood.
Every text token is a cell of its own.

Shapes: B batch, S sequence, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import nn

from dpn_cli.modeling.engine import DROPPED, Assignment
from dpn_cli.modeling.state import PyramidState
from dpn_cli.pyramid.config import Grid, Rate, num_tokens


def pool_cells(state: PyramidState, rates: Sequence[Rate], grids: Sequence[Sequence[Grid]]) -> Assignment:
    """Let every token go into the first one of its cell.

    Args:
        state: with visual tokens.
        rates: per sample, the kernel.
        grids: per sample, the sizes of its grids afterwards; tokens of cells that lie outside (the incomplete ones,
            where `rounding` is `floor`) are dropped.
    """
    assert state.coords is not None
    grid, token = state.coords[..., 0], state.coords[..., 1:]
    batch, length = grid.shape
    index = torch.arange(length, device=grid.device).expand(batch, -1)
    is_visual = grid >= 0
    cell = torch.where(is_visual[..., None], token // torch.tensor(rates, device=grid.device)[:, None], 0)  # [B, S, 2]
    num_grids = max(1, *map(len, grids))
    sizes = [[*sample, *[(0, 0)] * (num_grids - len(sample))] for sample in grids]
    size = torch.tensor(sizes, device=grid.device).gather(1, grid.clamp(min=0)[..., None].expand(-1, -1, 2))
    kept = ~is_visual | (cell < size).all(-1)
    kept = kept if state.valid is None else kept & state.valid

    span = max((max(size) for sample in state.grids for size in sample), default=1)
    key = torch.where(is_visual, length + (grid * span + cell[..., 0]) * span + cell[..., 1], index)
    first = torch.full((batch, length + num_grids * span * span), length, device=grid.device)
    first = first.scatter_reduce(1, key, torch.where(kept, index, length), "amin").gather(1, key)
    before = [length] * batch if state.valid is None else state.valid.sum(1).tolist()
    return Assignment(
        target=torch.where(kept, first, DROPPED),
        coords=torch.where(is_visual[..., None], torch.cat([grid[..., None], cell], -1), -1),
        lengths=[
            count - num_tokens(old) + num_tokens(new)
            for count, old, new in zip(before, state.grids, grids, strict=True)
        ],
    )


class Kernels(nn.Module):
    """The depthwise convolutions of one site, [D, kernel_h, kernel_w] per rate; they start as averages."""

    def __init__(self, hidden_size: int, rates: Sequence[Rate]) -> None:
        super().__init__()
        for expert, (h, w) in enumerate(rates):
            self.register_parameter(str(expert), nn.Parameter(torch.full((hidden_size, h, w), 1 / (h * w))))

    def forward(self, expert: int) -> torch.Tensor:
        """Return the kernel of an expert; a call, so that hooks which load weights (offloading) run."""
        return self.get_parameter(str(expert))
