"""Run what a stranger wrote, such as a chat template, in a child process with little time and memory. No torch."""

import faulthandler
import json
import os
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

_STATM = Path("/proc/self/statm")  # its sixth word says how many pages of memory are this process's own


class OverLimitError(Exception):
    """The work took more time or memory than it may."""


def run_bounded(work: Callable[[], str], seconds: int, nbytes: int) -> str:
    """Return what `work` returns, from a fork of this process, so that it sees all that is loaded here.

    Args:
        work: the work; it must not use torch, whose threads do not live in a fork.
        seconds: the most CPU time it may take.
        nbytes: the most memory it may add to what this process has.

    Raises:
        OverLimitError: if it takes more, or crashes.
        RuntimeError: with the message of what it raises.
    """
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the child needs none of them
        child = os.fork()  # multiprocessing would refuse where this process is a worker of a data loader
    if child == 0:
        try:
            _send(sender, work, seconds, nbytes)
        finally:
            os._exit(0)
    os.close(sender)
    try:
        with os.fdopen(receiver, "rb") as stream:
            said = stream.read()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        text, fault = json.loads(said)
    except ValueError:
        raise OverLimitError from None
    if fault is not None:
        raise RuntimeError(fault)
    return str(text)


def own_bytes() -> int:
    """Return the memory that counts towards RLIMIT_DATA: what this process has allocated, used or not."""
    return int(_STATM.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")


def _send(sender: int, work: Callable[[], str], seconds: int, nbytes: int) -> None:
    """Do the work, and send its text and its fault, one of which is None, as JSON."""
    memory = (resource.RLIMIT_DATA, own_bytes() + nbytes)
    for kind, limit in (memory, (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the panic or the abort of a library would speak
    faulthandler.disable()
    try:
        said: tuple[str | None, str | None] = (work(), None)
    except MemoryError:
        return  # the end of the pipe says so
    except Exception as error:  # noqa: BLE001 - it may raise whatever it likes
        said = (None, next(iter(str(error).splitlines()), type(error).__name__))
    with os.fdopen(sender, "w", encoding="utf-8") as stream:
        json.dump(said, stream)
