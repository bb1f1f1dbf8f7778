"""How many threads torch computes with, where that matters."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

WIDE = 1024  # width of a model from which its routers' matrices keep several threads busy


def threads_for(width: int) -> AbstractContextManager[None]:
    """Compute on one thread where the model is narrow, else on as many as are set."""
    return one_thread() if width < WIDE else nullcontext()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: small matrices gain nothing from more, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
