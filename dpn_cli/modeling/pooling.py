"""Pooling of visual tokens in a ragged batch: every sample at its own rate, text untouched.

A *cell* is the kernel_h × kernel_w block of one grid that becomes one token; it stands where its first token stood.
Every text token is a cell of its own. Rows are re-left-padded to the longest sample.

Shapes: B batch, S sequence, D hidden, K pooled sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dpn_cli.pyramid.config import Grid, Rate, kernel_on


@dataclass(frozen=True)
class Cells:
    """Which token goes where.

    Attributes:
        column: [B, S] the new column of every token; of a dropped token, that of some kept one.
        kept: [B, S] bool; False for padding and for the incomplete cells that `rounding: floor` drops.
        leads: [B, S] bool; True for the first token of every cell.
        coords: [B, K, 3] (grid, row, col) of the cells, -1 for text and padding.
        area: [B, K] tokens of a complete cell: kernel_h · kernel_w for visual cells, 1 for text.
        valid: [B, K] bool, or None when no row is padded.
    """

    column: torch.Tensor
    kept: torch.Tensor
    leads: torch.Tensor
    coords: torch.Tensor
    area: torch.Tensor
    valid: torch.Tensor | None


def merge_cells(
    coords: torch.Tensor,
    valid: torch.Tensor | None,
    grids: Sequence[Sequence[Grid]],
    rates: Sequence[Rate],
    lengths: Sequence[int],
    rounding: Literal["ceil", "floor"] = "ceil",
) -> Cells:
    """Assign every token to its cell.

    Args:
        coords: [B, S, 3], long: (grid, row, col) of visual tokens, -1 elsewhere.
        valid: [B, S] bool, or None when no row is padded.
        grids: per sample, the sizes of its grids.
        rates: per sample, the kernel.
        lengths: per sample, its tokens after pooling.
        rounding: what happens to incomplete cells at the edges.
    """
    batch, length = coords.shape[:2]
    device = coords.device
    index = torch.arange(length, device=device).expand(batch, -1)
    kernel = torch.tensor(rates, device=device)[:, None]  # [B, 1, 2]
    is_visual = coords[..., 0] >= 0
    cell = torch.where(is_visual[..., None], coords[..., 1:] // kernel, 0)  # [B, S, 2]
    kept = torch.ones_like(is_visual) if valid is None else valid
    if rounding == "floor":
        kept = kept & _is_complete(cell, coords[..., 0], grids, rates)

    span = max((max(grid) for sample in grids for grid in sample), default=1)
    num_grids = max(map(len, grids))
    key = length + (coords[..., 0] * span + cell[..., 0]) * span + cell[..., 1]
    key = torch.where(is_visual, key, index)
    leader = torch.full((batch, length + num_grids * span * span), length, device=device)
    leader = leader.scatter_reduce(1, key, torch.where(kept, index, length), "amin").gather(1, key)
    leads = kept & (leader == index)
    longest = max(lengths)
    shift = longest - torch.tensor(lengths, device=device)[:, None]  # [B, 1], left padding
    column = (leads.cumsum(1) - 1).gather(1, leader.clamp(max=length - 1)) + shift
    column = column.clamp(0, longest - 1)
    padded = len(set(lengths)) > 1

    new_coords = torch.full((batch, longest + 1, 3), -1, device=device)  # the last column takes what is not a leader
    cell_coords = torch.where(is_visual[..., None], torch.cat([coords[..., :1], cell], -1), -1)
    target = torch.where(leads, column, longest)[..., None].expand(-1, -1, 3)
    new_coords = new_coords.scatter(1, target, cell_coords)[:, :longest]
    new_valid = torch.arange(longest, device=device) >= shift if padded else None
    area = torch.where(new_coords[..., 0] >= 0, kernel.prod(-1), 1)
    return Cells(column, kept, leads, new_coords, area, new_valid)


def _is_complete(
    cell: torch.Tensor, grid: torch.Tensor, grids: Sequence[Sequence[Grid]], rates: Sequence[Rate]
) -> torch.Tensor:
    """Say which tokens, [B, S], belong to a cell that lies whole inside its grid; text always does."""
    table = torch.zeros(*grid.shape, 2, dtype=torch.long)  # rows and columns of complete cells; S bounds the grids
    for b, sample in enumerate(grids):
        for g, size in enumerate(sample):
            kernel = kernel_on(size, rates[b])
            table[b, g] = torch.tensor([size[0] // kernel[0], size[1] // kernel[1]])
    sizes = table.to(cell.device).gather(1, grid.clamp(min=0)[..., None].expand(-1, -1, 2))
    return (grid < 0) | (cell < sizes).all(-1)


class Kernels(nn.Module):
    """The depthwise convolutions of one site, [D, kernel_h, kernel_w] per rate; they start as averages."""

    def __init__(self, hidden_size: int, rates: Sequence[Rate]) -> None:
        super().__init__()
        for expert, (h, w) in enumerate(rates):
            self.register_parameter(str(expert), nn.Parameter(torch.full((hidden_size, h, w), 1 / (h * w))))

    def forward(self, expert: int) -> torch.Tensor:
        """Return the kernel of an expert; a call, so that hooks which load weights (offloading) run."""
        return self.get_parameter(str(expert))


def pool_tokens(
    values: torch.Tensor,
    cells: Cells,
    mode: Literal["avg", "max"] = "avg",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reduce the tokens of every cell to one.

    Args:
        values: [B, S, D].
        cells: from `merge_cells`.
        mode: mean over the tokens that the cell has (an incomplete cell has fewer), or maximum.
        weights: [B, S, D] factors of a depthwise convolution; they replace the mean's 1/n and are scaled up in
            incomplete cells.

    Returns:
        [B, K, D] in the dtype of `values`, accumulated in float32; padding is zero.
    """
    batch, _, size = values.shape
    longest = cells.coords.shape[1]
    trash = batch * longest  # one extra row takes the dropped tokens
    rows = torch.arange(batch, device=values.device)[:, None] * longest
    target = torch.where(cells.kept, rows + cells.column, trash).flatten()
    source = (values.float() if weights is None else values.float() * weights.float()).flatten(0, 1)
    out = source.new_zeros(trash + 1, size)
    if mode == "max":
        out = out.scatter_reduce(0, target[:, None].expand(-1, size), source, "amax", include_self=False)[:trash]
    else:
        count = source.new_zeros(trash + 1).index_add(0, target, source.new_ones(target.shape[0]))[:trash]
        scale = (1 if weights is None else cells.area.flatten()) / count.clamp(min=1)
        out = out.index_add(0, target, source)[:trash] * scale[:, None]
    return out.view(batch, longest, size).to(values.dtype)
