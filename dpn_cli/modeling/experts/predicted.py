"""`predicted`: the visual tokens stay that a small network foresees the answer will need.

Source: ours; see `dpn_cli.modeling.predictors`.

Shapes: B batch, S sequence, T text tokens, D hidden.
"""

import torch

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.experts.select import select
from dpn_cli.modeling.state import PyramidState
from dpn_cli.pyramid.experts import PREDICTOR_TEXT


def predicted_tokens(batch: Reducible) -> Assignment:
    """Keep the tokens that the predictor of this site scores highest."""
    predictor = batch.text_model.predictors[str(batch.next_layer)]
    scores = predictor(batch.state.hidden_states, *last_text(batch.state))
    return select(batch, scores.to(batch.coords.device))  # layers and predictors may be on several devices


def last_text(state: PyramidState) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last text tokens of every sample's instruction [B, T, D], and which of them there are, [B, T] bool."""
    columns, is_there = last_columns(state.is_text, max(state.text_tokens))
    return state.hidden_states.gather(1, columns[..., None].expand(-1, -1, state.hidden_states.shape[-1])), is_there


def last_columns(some: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of the last of some tokens [B, S] bool, [B, T] from the last on, and which there are.

    `count` is the largest number of them in a sample; no more than `PREDICTOR_TEXT` are returned.
    """
    columns = torch.arange(some.shape[1], device=some.device).expand(some.shape).masked_fill(~some, -1)
    columns = columns.topk(max(1, min(PREDICTOR_TEXT, count)), dim=1).values
    return columns.clamp(min=0), columns >= 0
