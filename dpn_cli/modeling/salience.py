"""Salience: how much the vision tower attends to each patch, for experts that choose by it.

Source: VisionZip, https://arxiv.org/abs/2412.04467, section 3.2: the attention of the layer whose output the projector
takes, from the class token where the tower has one, otherwise from all patches. It is computed apart, so that the tower
keeps its kernels.

Shapes: I images or tiles, T tokens of the tower, N patches, B batch, L sequence.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from dpn_cli.modeling.state import precise

Change = Callable[[torch.Tensor], Iterable[torch.Tensor]]
_CHANGES: ContextVar[list[Change] | None] = ContextVar("dpn_changes", default=None)


@contextmanager
def changes_noted() -> Iterator[list[Change]]:
    """Note for the duration, in this thread or task alone, what is done to features between tower and decoder."""
    changes: list[Change] = []
    token = _CHANGES.set(changes)
    try:
        yield changes
    finally:
        _CHANGES.reset(token)


def note_change(change: Change) -> None:
    """Note what is done to features [I, N, D], to be done to their salience [I, N, 1] too, if it is wanted."""
    changes = _CHANGES.get()
    if changes is not None:
        changes.append(change)


@torch.no_grad()
def patch_salience(layer: Any, hidden_states: torch.Tensor, has_class_token: bool) -> torch.Tensor:
    """Return the attention [I, N, 1] that every patch gets, the mean over the heads and over the tokens that attend.

    Args:
        layer: Layer of a vision tower of CLIP's or SigLIP's kind.
        hidden_states: its input, [I, T, width].
        has_class_token: whether the first token is the class token, which then is the one that attends.
    """
    attention, hidden_states = layer.self_attn, layer.layer_norm1(hidden_states)
    attending = hidden_states[:, :1] if has_class_token else hidden_states
    keys, queries = (
        linear(states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for linear, states in ((attention.k_proj, hidden_states), (attention.q_proj, attending))
    )
    pairs = zip(queries, keys, strict=True)  # an image at a time: of all pairs of its patches there may be many
    means = [(precise(query @ key.mT) * attention.scale).softmax(-1).mean((0, 1)) for query, key in pairs]
    return torch.stack(means)[:, int(has_class_token) :, None]


def at_tokens(salience: Sequence[torch.Tensor], coords: torch.Tensor) -> torch.Tensor:
    """Return the salience [B, L] of visual tokens, 0 elsewhere.

    Args:
        salience: of the tokens of every image, [N, 1], in the order of the images.
        coords: [B, L, 3] (grid, row, col) of the tokens of these images, -1 elsewhere.
    """
    flat = torch.cat(list(salience)).to(coords.device)
    return flat.new_zeros(coords.shape[:2]).masked_scatter(coords[..., 0] >= 0, flat)
