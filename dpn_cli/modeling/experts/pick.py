"""`pick`: of every cell of a grid the one token that stands out most; it stays as it is, where it is.

Ours. A token stands out if it is unlike the mean of all visual tokens of its sample.

Shapes: B batch, S sequence.
"""

import torch

from dpn_cli.modeling.engine import DROPPED, Assignment
from dpn_cli.modeling.experts.pool import pooled_cells
from dpn_cli.modeling.experts.reducible import Reducible, cosines


def picked_tokens(batch: Reducible) -> Assignment:
    """Drop all tokens of a cell but one."""
    cells = pooled_cells(batch)
    index = torch.arange(cells.target.shape[1], device=cells.target.device)
    cell = torch.where(cells.target == DROPPED, index, cells.target)
    oddity = 1 - cosines(batch.features, batch.visual_mean)[..., 0]
    oddity = torch.where(cells.target == DROPPED, -1, oddity)
    best = torch.full_like(oddity, -torch.inf).scatter_reduce(1, cell, oddity, "amax")
    is_best = (oddity == best.gather(1, cell)) & (cells.target != DROPPED)
    first = torch.full_like(cell, len(index)).scatter_reduce(
        1, cell, torch.where(is_best, index, len(index)), "amin", include_self=False
    )
    stays = first.gather(1, cell) == index
    return Assignment(torch.where(stays, index, DROPPED), cells.coords, cells.lengths)
