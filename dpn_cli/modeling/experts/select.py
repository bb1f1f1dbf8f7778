"""What all selections share: the visual tokens with the best scores stay, the rest goes or is merged.

Merged into cells (RESTORE; ToMe, https://arxiv.org/abs/2210.09461), the rest of every cell becomes one token. Its place
is that of the token with the lowest score, which is never selected, so that the count follows from the grids.

Shapes: B batch, S sequence.
"""

import torch

from dpn_cli.modeling.engine import DROPPED, Assignment
from dpn_cli.modeling.experts.pool import best_of_cells, pooled_cells
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.state import put


def select(batch: Reducible, scores: torch.Tensor) -> Assignment:
    """Let the visual tokens with the best scores [B, S] stay, as many as each sample's expert selects.

    Ties go to the first.
    """
    plain = batch.keep(batch.best(scores))
    with_rest = [expert.cells is not None for expert in batch.experts]
    if not any(with_rest):
        return plain
    merged = _merge_rest(batch, scores)
    target = torch.where(put(with_rest, scores.device)[:, None], merged, plain.target)
    return Assignment(target, lengths=plain.lengths, merges=True)


def _merge_rest(batch: Reducible, scores: torch.Tensor) -> torch.Tensor:
    """Return the targets [B, S] where all but the best tokens go into the lowest one of their cell."""
    index = torch.arange(scores.shape[1], device=scores.device)
    cells = pooled_cells(batch)
    anchor = best_of_cells(cells, -scores)
    kept = batch.best(scores.masked_fill(anchor == index, -torch.inf))
    target = torch.where(kept | ~batch.is_visual, index, anchor)
    return torch.where(cells.target == DROPPED, DROPPED, target)
