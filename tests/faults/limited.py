"""A limit on what a test may take, in CPU time and memory."""

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
