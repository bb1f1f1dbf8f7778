"""`attended`: the visual tokens that the last token of the instruction attends to stay.

Source: PyramidDrop, https://arxiv.org/abs/2410.17247, section 3.2: ranked by the attention of the layer after the
site. Ours: kept tokens keep their positions.
"""

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.attention import instruction_attention
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.experts.select import select


def attended_tokens(batch: Reducible) -> Assignment:
    """Keep the tokens with the most attention of the next layer."""
    return select(batch, instruction_attention(batch.text_model, batch.state, batch.next_layer))
