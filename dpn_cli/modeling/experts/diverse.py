"""`diverse`: the visual tokens that differ most from each other stay.

Source: DivPrune, https://arxiv.org/abs/2503.02175: greedily add the token whose distance (1 - cosine) to the nearest
chosen one is largest. Ours: tokens are chosen inside blocks of the image, all blocks side by side, so that the number
of steps does not grow with the image; and those with the largest distances of all blocks stay, so that a plain block
gets fewer of them than a busy one. The first token of a block is the one that is least like the mean of the sample.

Shapes: B batch, S sequence, N blocks of a sample, M tokens of a block.
"""

import torch

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.blocks import Blocks
from dpn_cli.modeling.experts.reducible import Reducible, cosines
from dpn_cli.modeling.experts.select import select


def diverse_tokens(batch: Reducible) -> Assignment:
    """Keep the tokens that were farthest from all others when they were chosen in their blocks."""
    return select(batch, diversity(batch))


def diversity(batch: Reducible) -> torch.Tensor:
    """Return every visual token's distance to those chosen before it in its block, [B, S]; -1 for the rest."""
    blocks = Blocks(batch)
    features = blocks.gather(batch.features)
    to_mean = 1 - cosines(features, batch.visual_mean[:, None])[..., 0]
    to_mean = to_mean.masked_fill(~blocks.is_token, -1)
    return blocks.scores(*farthest_first(1 - cosines(features, features), to_mean, max(blocks.num_steps)))


def diverse_everywhere(batch: Reducible) -> Assignment:
    """Keep the tokens that are chosen in the whole sample, one by one: DivPrune, but for its first token; slow."""
    distance = 1 - cosines(batch.features, batch.features)
    to_mean = (1 - cosines(batch.features, batch.visual_mean)[..., 0]).masked_fill(~batch.is_visual, -1)
    tokens, _ = farthest_first(distance, to_mean, max(batch.num_selected))
    order = torch.arange(len(tokens), 0, -1.0, device=distance.device)
    scores = torch.zeros_like(to_mean).scatter_reduce(
        -1, torch.cat(tokens, -1), order.to(to_mean).expand(len(distance), -1), "amax"
    )
    return select(batch, scores)


def farthest_first(
    distance: torch.Tensor, nearest: torch.Tensor, num_steps: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Choose tokens one by one, each the farthest from those chosen before.

    Args:
        distance: [..., M, M] between tokens.
        nearest: [..., M] distance to what is there before any is chosen; -1 where there is no token.
        num_steps: tokens to choose.

    Returns:
        Per step, the token [..., 1] and its distance to the nearest before it.
    """
    size = distance.shape[-1]
    distance = distance.masked_fill(torch.eye(size, dtype=torch.bool, device=distance.device), -1).view(-1, size, size)
    every = torch.arange(len(distance), device=distance.device)
    shape, nearest = nearest.shape[:-1], nearest.view(-1, size)
    tokens, distances = [], []
    for _ in range(num_steps):  # three kernels a step
        far, token = nearest.max(-1)
        tokens.append(token.view(*shape, 1))
        distances.append(far.view(*shape, 1))
        nearest = torch.minimum(nearest, distance[every, token])
    return tokens, distances
