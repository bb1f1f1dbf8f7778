"""`covering`: the visual tokens that the others are most similar to stay.

Source: SCOPE, https://arxiv.org/abs/2510.24214, its coverage term: greedily add the token that most raises the sum over
all tokens of the similarity to the nearest chosen one (facility location). Ours: without its salience, and inside
blocks of the image, all of them side by side; the tokens with the largest gains of all blocks stay.

Shapes: B batch, N blocks of a sample, M tokens of a block.
"""

import torch

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.blocks import Blocks
from dpn_cli.modeling.experts.reducible import Reducible, cosines
from dpn_cli.modeling.experts.select import select


def covering_tokens(batch: Reducible) -> Assignment:
    """Keep the tokens that raised the sum most when they were chosen in their blocks."""
    blocks = Blocks(batch)
    features = blocks.gather(batch.features)
    similarity = cosines(features, features)  # [B, N, M, M]
    similarity = similarity.masked_fill(~blocks.is_token[..., None, :], -1)
    covered = torch.full_like(similarity[..., 0], -1)  # of every token: the similarity to the nearest chosen one
    free, tokens, gains = blocks.is_token, [], []
    for _ in range(max(blocks.num_steps)):
        gain = (similarity - covered[..., None, :]).clamp(min=0).sum(-1).masked_fill(~free, -1)
        most, token = gain.max(-1, keepdim=True)
        tokens.append(token)
        gains.append(most)
        free = free.scatter(-1, token, False)
        to_chosen = similarity.gather(2, token[..., None].expand(*token.shape, similarity.shape[-1]))[:, :, 0]
        covered = torch.maximum(covered, to_chosen)
    return select(batch, blocks.scores(tokens, gains))
