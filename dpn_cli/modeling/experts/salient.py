"""`salient`: the visual tokens that the vision tower attends to stay.

Source: VisionZip, https://arxiv.org/abs/2412.04467, section 3.2, training-free; see `dpn_cli.modeling.salience`. Ours:
one choice for all images of a sample, whose tokens keep their order and positions, where the authors put the dominant
ones first and number anew; the class token itself does not go on.

Shapes: B batch, S sequence, C contextual tokens.
"""

import torch

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.reducible import Reducible, cosines
from dpn_cli.modeling.experts.select import select
from dpn_cli.modeling.state import put, take_columns
from dpn_cli.pyramid.experts import contextual, num_tokens


def salient_tokens(batch: Reducible) -> Assignment:
    """Keep the most salient tokens."""
    return select(batch, batch.salience)


def salient_and_contextual(batch: Reducible) -> Assignment:
    """Keep the most salient tokens, and merge the rest into a few evenly spaced tokens that are most similar.

    The authors merge before the projector, by the tower's keys; here it is what the decoder gets that is compared.
    """
    device = batch.coords.device
    counts = [contextual(number) for number in batch.num_selected]
    dominant = [number - count for number, count in zip(batch.num_selected, counts, strict=True)]
    others = [num_tokens(grids) - number for grids, number in zip(batch.state.grids, dominant, strict=True)]
    steps = [max(1, number // max(count, 1)) for number, count in zip(others, counts, strict=True)]

    is_dominant = batch.best(batch.salience, dominant)
    is_other = batch.is_visual & ~is_dominant
    order, step, count = is_other.cumsum(1) - 1, put(steps, device)[:, None], put(counts, device)[:, None]
    is_anchor = is_other & (order % step == 0) & (order // step < count)
    plain = batch.keep(is_dominant | is_anchor)

    most = max(1, *counts)
    anchors = is_anchor.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # [B, C]
    similarity = cosines(batch.features, take_columns(batch.features, anchors))  # [B, S, C]
    is_none = torch.arange(most, device=device) >= count
    nearest = anchors.gather(1, similarity.masked_fill(is_none[:, None], -torch.inf).argmax(-1))
    target = torch.where(is_other & ~is_anchor & (count > 0), nearest, plain.target)
    return Assignment(target, lengths=plain.lengths, merges=True)
