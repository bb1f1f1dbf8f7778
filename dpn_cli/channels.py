"""stdout and stderr as a command finds them: closed, full, gone with their terminal, or unable to spell a character."""

import codecs
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from dpn_cli.errors import DpnError

STDOUT, STDERR = 1, 2
_ESCAPED = "dpn-escaped"  # an error handler of codecs


def prepare() -> None:
    r"""Keep the numbers of closed streams from the files that are opened, and write what cannot be spelt as \u2192."""
    codecs.register_error(_ESCAPED, _escaped)
    for number in (0, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # takes the lowest number; to write to it fails, as to a closed stream
    sys.stdout = sys.stdout or _opened(STDOUT)
    sys.stderr = sys.stderr or _opened(STDERR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_ESCAPED)


def _opened(number: int) -> TextIOWrapper:
    return open(number, "w", encoding="utf-8", closefd=False)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Return the characters that an encoding lacks as JSON writes them."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def silence(*numbers: int) -> None:
    """Let what is written to stdout or stderr go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in numbers:
        os.dup2(nowhere, number)
    os.close(nowhere)


@contextmanager
def results() -> Iterator[None]:
    """Say in one sentence that results could not be printed; a reader that has seen enough (`| head -1`) is told less.

    Raises:
        DpnError: if stdout is closed or full.
        BrokenPipeError: if nobody reads it any more.
    """
    try:
        yield
    except OSError as error:
        silence(STDOUT)  # what is left in the buffer
        if isinstance(error, BrokenPipeError):
            raise
        raise DpnError(
            f"stdout cannot be written ({error.strerror}): the results are not shown; files that were written are "
            "complete"
        ) from error


@contextmanager
def messages() -> Iterator[None]:
    """Go on, in silence, where stderr cannot be written: no message is worth the work."""
    try:
        yield
    except OSError:
        silence(STDERR)


class Stderr:
    """stderr as it is at the moment, for messages."""

    def write(self, text: str) -> int:
        """Write text, as far as that is possible."""
        with messages():
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, as far as that is possible."""
        with messages():
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)
