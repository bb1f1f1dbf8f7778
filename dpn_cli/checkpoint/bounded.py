"""Run what a stranger wrote, such as a chat template, in a child process with little time and memory. No torch."""

import multiprocessing
import os
import resource
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
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
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_send, args=(sender, work, seconds, nbytes), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the child needs none of them
        child.start()
    sender.close()
    try:
        text, fault = receiver.recv()
    except EOFError:
        raise OverLimitError from None
    finally:
        child.kill()
        child.join()
        receiver.close()
    if fault is not None:
        raise RuntimeError(fault)
    return str(text)


def own_bytes() -> int:
    """Return the memory that counts towards RLIMIT_DATA: what this process has allocated, used or not."""
    return int(_STATM.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")


def _send(sender: Connection, work: Callable[[], str], seconds: int, nbytes: int) -> None:
    """Do the work, and send its text and its fault, one of which is None."""
    memory = (resource.RLIMIT_DATA, own_bytes() + nbytes)
    for kind, limit in (memory, (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        sender.send((work(), None))
    except MemoryError:
        pass  # the end of the pipe says so
    except Exception as error:  # noqa: BLE001 - it may raise whatever it likes
        sender.send((None, next(iter(str(error).splitlines()), type(error).__name__)))
