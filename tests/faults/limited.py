"""Limits on what a test may take, in CPU time, memory and the size of files."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from dpn_cli.checkpoint.bounded import own_bytes


class Hang(BaseException):
    """A case that does not end."""


@contextmanager
def limited(seconds: float, nbytes: int) -> Iterator[None]:
    """Raise `Hang` in what takes more CPU time, and let allocations fail beyond so many bytes more than now."""

    def hang(*_: object) -> None:
        raise Hang

    memory = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGPROF, hang)
    resource.setrlimit(resource.RLIMIT_DATA, (own_bytes() + nbytes, memory[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_DATA, memory)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, as a full disk would not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
