"""The simplest experts: all tokens, none, and the controls that every method has to beat, random and even spacing."""

import zlib

import torch

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.experts.select import select
from dpn_cli.modeling.state import put
from dpn_cli.pyramid.experts import num_tokens


def every_token(batch: Reducible) -> Assignment:
    """Keep all visual tokens."""
    return batch.keep(batch.is_visual)


def no_token(batch: Reducible) -> Assignment:
    """Drop all visual tokens."""
    return batch.keep(torch.zeros_like(batch.is_visual))


def spaced_tokens(batch: Reducible) -> Assignment:
    """Keep visual tokens at even distances, in the order of the sequence."""
    count = put(batch.num_selected, batch.coords.device)[:, None]
    total = batch.is_visual.sum(1, keepdim=True)
    after = batch.is_visual.cumsum(1) * count // total
    before = (batch.is_visual.cumsum(1) - 1) * count // total
    return batch.keep(after > before)


def random_tokens(batch: Reducible) -> Assignment:
    """Keep random visual tokens.

    The random seed is made of the sizes of a sample, so that an answer depends neither on the batch nor on the run.
    """
    scores = torch.zeros(batch.is_visual.shape, dtype=torch.float32)
    sizes = zip(batch.state.image_grids, batch.state.text_tokens, batch.state.grids, strict=True)
    for row, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(zlib.crc32(repr(size).encode()))
        count = num_tokens(batch.state.grids[row])
        scores[row, -count:] = torch.rand(count, generator=generator, dtype=torch.float32)
    order = (batch.is_visual.sum(1, keepdim=True) - batch.is_visual.long().cumsum(1)).to(scores.device)
    return select(batch, scores.flip(1).gather(1, order).to(batch.coords.device))
