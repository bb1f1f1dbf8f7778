"""`relevant`: of twice as many diverse visual tokens, those that the last token of the instruction attends to stay.

Source: CDPruner, https://arxiv.org/abs/2506.10967, which weighs diversity by relevance (a conditional DPP). Ours: two
steps in place of its greedy loop over all tokens, and the attention of the next layer as relevance, in place of the
similarity of CLIP's text and image features.
"""

from dataclasses import replace

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.attention import instruction_attention
from dpn_cli.modeling.experts.diverse import diversity
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.experts.select import select


def relevant_tokens(batch: Reducible) -> Assignment:
    """Keep the most attended of the diverse tokens."""
    twice = replace(batch, experts=[replace(each, share=min(1.0, 2 * (each.share or 0))) for each in batch.experts])
    attention = instruction_attention(batch.text_model, batch.state, batch.next_layer)
    return select(batch, attention.masked_fill(~twice.best(diversity(twice)), -1))
