"""States and batches to try experts on, without a model."""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.pyramid_text import PYRAMID_TEXT_MODELS
from dpn_cli.modeling.state import PyramidState
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.experts import KEEP, Expert, Grid
from tests.conftest import tiny_text_config


def state_of(
    hidden: torch.Tensor, coords: torch.Tensor, grids: tuple[tuple[Grid, ...], ...], valid: torch.Tensor | None = None
) -> PyramidState:
    """Return a state before any reduction, whose last token ends the instruction."""
    batch, length = coords.shape[:2]
    last = torch.full((batch,), length - 1)
    positions = torch.arange(length).float().expand(batch, -1)
    return PyramidState(
        hidden, positions, valid, coords=coords, salience=hidden.norm(dim=-1), instruction=last,
        grids=grids, coord_grids=grids, text_tokens=(0,) * batch, image_grids=grids,
        lengths=(length,) * batch if valid is None else tuple(valid.sum(1).tolist()),
    )  # fmt: skip


def reducible(state: PyramidState, experts: Sequence[Expert], text_model: Any = None, **settings: Any) -> Reducible:
    """Return a batch as experts see it."""
    pyramid = PyramidConfig(sites=(Site(0, (KEEP,)),), **settings)
    return Reducible(state, experts, text_model or SimpleNamespace(pyramid=pyramid), next_layer=1)


@cache
def tiny_text_model() -> Any:
    """Return a decoder of two layers, for experts that look at the next one."""
    torch.manual_seed(0)
    config = tiny_text_config("llama")
    config.update({"num_hidden_layers": 2})
    pyramid = PyramidConfig(sites=(Site(0, (KEEP, Expert("predicted", 0.5), Expert("guided", 0.5))),))
    return PYRAMID_TEXT_MODELS["llama"]._from_config(config, pyramid=pyramid).eval()
