"""`attended`: the visual tokens that the last token of the instruction attends to stay; the others go, or are merged.

Source: PyramidDrop, https://arxiv.org/abs/2410.17247, section 3.2: ranked by the attention of the layer after the
site. Ours: kept tokens keep their positions; with cells, the rest of every cell is merged into one token, the least
attended of the cell, so that the count follows from the grids.

Shapes: B batch, S sequence.
"""

import torch

from dpn_cli.modeling.engine import DROPPED, Assignment
from dpn_cli.modeling.experts.attention import instruction_attention
from dpn_cli.modeling.experts.pool import best_of_cells, pooled_cells
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.state import put


def attended_tokens(batch: Reducible) -> Assignment:
    """Keep the tokens with the most attention of the next layer."""
    scores = instruction_attention(batch.text_model, batch.state, batch.next_layer)
    with_rest = put([expert.cells is not None for expert in batch.experts], scores.device)
    plain = batch.keep(batch.best(scores))
    if not any(expert.cells for expert in batch.experts):
        return plain
    merged = _merge_rest(batch, scores)
    return Assignment(torch.where(with_rest[:, None], merged, plain.target), lengths=plain.lengths)


def _merge_rest(batch: Reducible, scores: torch.Tensor) -> torch.Tensor:
    """Return the targets [B, S] where all but the best tokens go into the least attended one of their cell."""
    index = torch.arange(scores.shape[1], device=scores.device)
    cells = pooled_cells(batch)
    anchor = best_of_cells(cells, -scores)
    kept = batch.best(scores.masked_fill(anchor == index, -1))
    target = torch.where(kept | ~batch.is_visual, index, anchor)
    return torch.where(cells.target == DROPPED, DROPPED, target)
