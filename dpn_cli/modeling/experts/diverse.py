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
from dpn_cli.modeling.experts.reducible import Reducible


def diverse_tokens(batch: Reducible) -> Assignment:
    """Keep the tokens that were farthest from all others when they were chosen in their blocks."""
    return batch.keep(batch.best(diversity(batch)))


def diversity(batch: Reducible) -> torch.Tensor:
    """Return every visual token's distance to those chosen before it in its block, [B, S]; -1 for the rest."""
    blocks = Blocks(batch)
    features = blocks.gather(batch.features)
    distance = 1 - features @ features.transpose(2, 3)  # [B, N, M, M]
    first = 1 - features @ batch.visual_mean[:, None].transpose(2, 3)
    first = first[..., 0].masked_fill(~blocks.is_token, -1)
    return blocks.scatter(farthest_first(distance, first, blocks.num_steps), absent=-1)


def diverse_everywhere(batch: Reducible) -> Assignment:
    """Keep the tokens that are chosen in the whole sample, one by one: DivPrune, but for its first token; slow."""
    distance = 1 - batch.features @ batch.features.transpose(1, 2)
    first = (1 - (batch.features * batch.visual_mean).sum(-1)).masked_fill(~batch.is_visual, -1)
    most = max(expert.selected(grids) for expert, grids in zip(batch.experts, batch.state.grids, strict=True))
    return batch.keep(batch.best(farthest_first(distance, first, most)))


def farthest_first(distance: torch.Tensor, first: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Choose tokens one by one, each the farthest from those chosen before.

    Args:
        distance: [..., M, M] between tokens.
        first: [..., M] distance to what is there before any is chosen; -1 where there is no token.
        num_steps: tokens to choose.

    Returns:
        [..., M] the distance at which every token was chosen, -1 for the others.
    """
    distance = distance.masked_fill(torch.eye(distance.shape[-1], dtype=torch.bool, device=distance.device), -1)
    nearest, tokens, distances = first, [], []
    for _ in range(num_steps):  # four kernels a step
        far, token = nearest.max(-1, keepdim=True)
        tokens.append(token)
        distances.append(far)
        to_chosen = distance.gather(-2, token[..., None].expand(*token.shape, distance.shape[-1]))[..., 0, :]
        nearest = torch.minimum(nearest, to_chosen)
    chosen = torch.full_like(first, -1)
    return chosen.scatter_reduce(-1, torch.cat(tokens, -1), torch.cat(distances, -1), "amax")
