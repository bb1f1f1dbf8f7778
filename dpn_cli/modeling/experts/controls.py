"""The simplest experts: all tokens, none, and the controls that every method has to beat, random and even spacing."""

import zlib

import torch

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.reducible import Reducible


def every_token(batch: Reducible) -> Assignment:
    """Keep all visual tokens."""
    return batch.keep(batch.is_visual)


def no_token(batch: Reducible) -> Assignment:
    """Drop all visual tokens."""
    return batch.keep(torch.zeros_like(batch.is_visual))


def spaced_tokens(batch: Reducible) -> Assignment:
    """Keep visual tokens at even distances, in the order of the sequence."""
    count = batch.num_selected[:, None]
    total = batch.is_visual.sum(1, keepdim=True)
    after = batch.is_visual.cumsum(1) * count // total
    before = (batch.is_visual.cumsum(1) - 1) * count // total
    return batch.keep(after > before)


def random_tokens(batch: Reducible) -> Assignment:
    """Keep random visual tokens.

    The draw is seeded by the prompt's text at this depth, so that an answer depends neither on the batch nor on the
    run.
    """
    state = batch.state
    assert state.instruction is not None
    column = torch.arange(batch.is_visual.shape[1], device=batch.coords.device)
    is_prompt = ~batch.is_visual & (column <= state.now_at(state.instruction[:, None]))
    is_prompt = is_prompt if state.valid is None else is_prompt & state.valid
    scores = torch.zeros(batch.is_visual.shape)
    for row, (chosen, visual) in enumerate(zip(is_prompt, batch.is_visual, strict=True)):
        text = state.positions[row, chosen].cpu().numpy().tobytes()
        text += state.hidden_states[row, chosen, :4].float().mul(8).round().cpu().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(text))
        scores[row, visual.cpu()] = torch.rand(int(visual.sum()), generator=generator)
    return batch.keep(batch.best(scores.to(batch.coords.device)))
