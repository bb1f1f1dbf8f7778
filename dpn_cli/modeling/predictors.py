"""Predictors: small networks that foresee which visual tokens an answer will need, from the tokens before the site.

Source: ours. The teacher is the attention of the whole model (see `dpn_cli.calibration.predictors`); that of a single
early layer overlooks much.

Shapes: B batch, S sequence, V visual tokens, D hidden, T text tokens.
"""

import torch
from torch import nn

from dpn_cli.modeling.guide import Guide
from dpn_cli.modeling.matcher import Matcher
from dpn_cli.modeling.state import PyramidState, take_columns
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.experts import num_tokens
from dpn_cli.pyramid.predictors import READ_TEXT

Predictor = Matcher | Guide
PREDICTORS: dict[str, type[Predictor]] = {"predicted": Matcher, "guided": Guide}
"""By the kind of expert that has it."""


def new_predictors(hidden_size: int, pyramid: PyramidConfig) -> nn.ModuleDict:
    """Return fresh predictors for all sites that have an expert in need of one, by their names."""
    return nn.ModuleDict({name: PREDICTORS[kind](hidden_size) for name, (kind, _) in pyramid.predictors.items()})


def predicted_scores(predictor: nn.Module, state: PyramidState) -> torch.Tensor:
    """Let a predictor score the visual tokens of a batch; return [B, S], 0 for other tokens."""
    assert state.coords is not None
    is_visual = state.coords[..., 0] >= 0
    columns, is_there = last_columns(is_visual, max(map(num_tokens, state.grids)))
    coords = take_columns(state.coords, columns).masked_fill(~is_there[..., None], -1)
    scores = predictor(take_columns(state.hidden_states, columns), coords, *last_text(state))
    columns, is_there = columns.to(scores.device), is_there.to(scores.device)
    spread = scores.new_zeros(is_visual.shape)
    return spread.scatter_add(1, columns, scores.masked_fill(~is_there, 0))


def last_text(state: PyramidState) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last text tokens of every sample's instruction [B, T, D], and which of them there are, [B, T] bool."""
    columns, is_there = last_columns(state.is_text, min(READ_TEXT, max(state.text_tokens)))
    return take_columns(state.hidden_states, columns), is_there


def last_columns(some: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of the last `count` of some tokens [B, S] bool, from the last one on, and which there are."""
    columns = torch.arange(some.shape[1], device=some.device).expand(some.shape).masked_fill(~some, -1)
    columns = columns.topk(max(1, count), dim=1).values
    return columns.clamp(min=0), columns >= 0
