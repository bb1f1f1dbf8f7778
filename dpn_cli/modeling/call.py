"""What belongs to a caller of a model rather than to the model: temporary settings, and what its last prefill took.

Several threads and asyncio tasks may use one model, and each has a `Call` of its own: a new thread starts with the
model's own settings, a new task with those of the task that created it. None of this is stored on the model, so that
it can be copied and pickled.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from dpn_cli.modeling.state import PyramidState
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.experts import Grid


@dataclass(frozen=True)
class Call:
    """One caller's settings for a text model, None where the model's own apply, and what its last prefill took.

    Attributes:
        pools: whether visual tokens are reduced at all.
        adapts: whether layers with an adapter use it.
        routes: forced, one for all samples or one for each; empty where the routers choose.
        trade_off: λ, the loss that a whole prefill is worth.
        pyramid: Pyramid that the model runs as.
        reduce: Function that reduces the visual tokens of a batch at a site, given its number.
        last_routes: Routes that the last prefill took, per sample.
        last_grids: the visual grids of every sample of the last prefill, before any reduction.
    """

    pools: bool = True
    adapts: bool = True
    routes: tuple[Route, ...] | None = None
    trade_off: float | None = None
    pyramid: PyramidConfig | None = None
    reduce: Callable[[PyramidState, int], PyramidState] | None = None
    last_routes: tuple[Route, ...] = ()
    last_grids: tuple[tuple[Grid, ...], ...] = ()


_CALLS: ContextVar[WeakKeyDictionary[Any, Call]] = ContextVar("dpn_calls", default=WeakKeyDictionary())  # noqa: B039


def current_call(text_model: Any) -> Call:
    """Return the `Call` of the running thread or task."""
    return _CALLS.get().get(text_model) or Call()


def change_call(text_model: Any, **changes: Any) -> None:
    """Change the `Call` of the running thread or task, and no other."""
    calls = WeakKeyDictionary(_CALLS.get())  # a copy, as tasks share the one that they start with
    calls[text_model] = replace(current_call(text_model), **changes)
    _CALLS.set(calls)


@contextmanager
def changed_call(text_model: Any, **settings: Any) -> Iterator[None]:
    """Change settings for the duration; what the last prefill took is kept."""
    before = {name: getattr(current_call(text_model), name) for name in settings}
    change_call(text_model, **settings)
    try:
        yield
    finally:
        change_call(text_model, **before)
