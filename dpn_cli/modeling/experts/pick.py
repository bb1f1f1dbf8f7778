"""`pick`: of every cell of a grid the one token that stands out most; it stays as it is, where it is.

Ours. A token stands out if it is unlike the mean of all visual tokens of its sample.

Shapes: B batch, S sequence.
"""

import torch

from dpn_cli.modeling.engine import DROPPED, Assignment
from dpn_cli.modeling.experts.pool import best_of_cells, pooled_cells
from dpn_cli.modeling.experts.reducible import Reducible, cosines


def picked_tokens(batch: Reducible) -> Assignment:
    """Drop all tokens of a cell but one."""
    cells = pooled_cells(batch)
    index = torch.arange(cells.target.shape[1], device=cells.target.device)
    oddity = 1 - cosines(batch.features, batch.visual_mean)[..., 0]
    stays = (best_of_cells(cells, oddity) == index) & (cells.target != DROPPED)
    return Assignment(torch.where(stays, index, DROPPED), cells.coords, cells.lengths)
