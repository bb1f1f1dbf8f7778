"""States and batches to try experts on, without a model."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.state import PyramidState
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.experts import KEEP, Expert, Grid


def state_of(
    hidden: torch.Tensor, coords: torch.Tensor, grids: tuple[tuple[Grid, ...], ...], valid: torch.Tensor | None = None
) -> PyramidState:
    """Return a state before any reduction, whose last token ends the instruction."""
    batch, length = coords.shape[:2]
    last = torch.full((batch,), length - 1)
    positions = torch.arange(length).float().expand(batch, -1)
    return PyramidState(hidden, positions, valid, coords, instruction=last, grids=grids, coord_grids=grids)


def reducible(state: PyramidState, experts: Sequence[Expert], text_model: Any = None, **settings: Any) -> Reducible:
    """Return a batch as experts see it."""
    pyramid = PyramidConfig(sites=(Site(0, (KEEP,)),), **settings)
    return Reducible(state, experts, text_model or SimpleNamespace(pyramid=pyramid), next_layer=1)
