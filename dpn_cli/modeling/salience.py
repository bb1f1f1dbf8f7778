"""Salience: how much the vision tower attends to each patch, for experts that choose by it.

Source: VisionZip, https://arxiv.org/abs/2412.04467, section 3.2: the attention of the layer whose output the projector
takes, from the class token where the tower has one, otherwise from all patches. It is computed apart, so that the tower
keeps its kernels.

Shapes: I images or tiles, T tokens of the tower, N patches, B batch, L sequence.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from dpn_cli.modeling.state import precise


@dataclass
class Watch:
    """What a caller's pass through the vision tower has shown so far.

    Attributes:
        salience: [N] of every image or tile; after `lay_out`, of the visual tokens of every image.
    """

    salience: Sequence[torch.Tensor] = ()

    def in_place(self, coords: torch.Tensor) -> torch.Tensor:
        """Return the salience [B, L] of visual tokens, 0 elsewhere.

        Args:
            coords: [B, L, 3] (grid, row, col) of the visual tokens of these images, -1 elsewhere.
        """
        flat = torch.cat(list(self.salience)).to(coords.device)
        return flat.new_zeros(coords.shape[:2]).masked_scatter(coords[..., 0] >= 0, flat)


_WATCH: ContextVar[Watch | None] = ContextVar("dpn_watch", default=None)


@contextmanager
def watched(attention: Any, has_class_token: bool) -> Iterator[Watch]:
    """Watch an attention layer of the vision tower for the duration, in this thread or task alone.

    Args:
        attention: the layer, of CLIP's or SigLIP's kind.
        has_class_token: whether the first token is the class token.
    """
    watch = Watch()

    def see(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _WATCH.get() is watch:
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            watch.salience = list(_patch_salience(attention, hidden_states, has_class_token))

    hook, token = attention.register_forward_pre_hook(see, with_kwargs=True), _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(token)
        hook.remove()


def lay_out(change: Callable[[torch.Tensor], Iterable[torch.Tensor]]) -> None:
    """Do to the salience [I, N, 1] what is done to features [I, N, D], if it is being watched."""
    watch = _WATCH.get()
    if watch is not None:
        watch.salience = [each[..., 0] for each in change(torch.stack(list(watch.salience))[..., None])]


@torch.no_grad()
def _patch_salience(attention: Any, hidden_states: torch.Tensor, has_class_token: bool) -> torch.Tensor:
    """Return the attention [I, N] that every patch gets, the mean over the heads and over the tokens that attend.

    Args:
        attention: the layer.
        hidden_states: its input, [I, T, width].
        has_class_token: whether the first token is the class token, which then is the one that attends.
    """
    attending = hidden_states[:, :1] if has_class_token else hidden_states
    keys, queries = (
        layer(states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for layer, states in ((attention.k_proj, hidden_states), (attention.q_proj, attending))
    )
    pairs = zip(queries, keys, strict=True)  # an image at a time: of all pairs of its patches there may be many
    means = [(precise(query @ key.mT) * attention.scale).softmax(-1).mean((0, 1)) for query, key in pairs]
    return torch.stack(means)[:, int(has_class_token) :]
