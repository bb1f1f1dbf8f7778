"""Faults of the tokenizers library that are no exceptions. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_panic() -> Iterator[None]:
    """Raise RuntimeError where the library panics: its own class is a BaseException, which nobody catches."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error
