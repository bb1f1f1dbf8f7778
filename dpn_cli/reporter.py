"""How the library tells what it is doing, whoever listens."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass


@dataclass(frozen=True)
class Reporter:
    """Takes messages and progress; by itself it drops them. The console's is `console.REPORTER`.

    Attributes:
        note: takes a message.
        progress: takes a description and a total; the context yields `advance`, to be called with the number of steps
            done since the last call.
        copying: the same for bytes.
        waiting: takes what is being done, for the duration of the context, where nothing tells how far it is.
    """

    note: Callable[[str], None] = lambda message: None
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = lambda description, total: (
        nullcontext(lambda done: None)
    )
    copying: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = lambda description, nbytes: (
        nullcontext(lambda done: None)
    )
    waiting: Callable[[str], AbstractContextManager[None]] = lambda description: nullcontext()


SILENT = Reporter()
