"""`distinct`: the visual tokens least similar to a few pivots stay, and the pivots.

Source: DART, https://arxiv.org/abs/2502.11494: tokens that duplicate a pivot go. Ours: pivots are the visual tokens
with the largest hidden states, where the authors rank by their keys.
"""

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.reducible import Reducible, cosines
from dpn_cli.modeling.experts.select import select
from dpn_cli.modeling.state import precise
from dpn_cli.pyramid.experts import PIVOTS


def distinct_tokens(batch: Reducible) -> Assignment:
    """Keep the pivots and the tokens whose nearest pivot is the farthest."""
    size = precise(batch.state.hidden_states).norm(dim=-1).masked_fill(~batch.is_visual, -1)
    pivots = size.topk(min(PIVOTS, size.shape[1]), dim=1).indices  # [B, P]
    chosen = batch.features.gather(1, pivots[..., None].expand(-1, -1, batch.features.shape[-1]))
    distance = 1 - cosines(batch.features, chosen).amax(-1)
    return select(batch, distance.scatter(1, pivots, 2 + size.gather(1, pivots).sign()))
