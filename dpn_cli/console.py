"""What the commands show: messages and progress on stderr, tables and other results on stdout.

Paths, names, errors and answers may hold what a terminal obeys: here it is made visible.
"""

import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import click
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dpn_cli.reporter import Reporter

PLAIN_INTERVAL_S = 10.0
PLAIN_WIDTH = 200
DESCRIPTION_WIDTH = 18  # so that the bars of one command stand below each other

# C0 and C1 but for the tab and the end of a line, what turns the direction of text, other ends of lines, and halves of
# characters, which cannot be written at all.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_formatwarning = warnings.formatwarning
_stderr = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
_hushed: list[int] = []  # stderr as it was before `hush`


def set_quiet(quiet: bool) -> None:
    """Silence messages and progress; results and errors stay."""
    _stderr.quiet = quiet


def hush() -> None:
    """Write nowhere from now on: another process of this run says the same."""
    _hushed.append(os.dup(2))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def speak_up() -> None:
    """Write to stderr again, since no other process says what follows."""
    while _hushed:
        descriptor = _hushed.pop()
        os.dup2(descriptor, 2)
        os.close(descriptor)


def harmless(text: str) -> str:
    r"""Return text with what a terminal would obey written as \u001b, which is right inside of JSON too."""
    return _OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def guard_libraries() -> None:
    """Make logs, warnings and tracebacks harmless too, which may quote a checkpoint's files."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = lambda *args, **kwargs: harmless(_formatwarning(*args, **kwargs))
    sys.excepthook = lambda kind, error, trace: echo(
        "".join(traceback.format_exception(kind, error, trace)), nl=False, err=True
    )


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return harmless(super().getMessage())


def echo(text: str, nl: bool = True, err: bool = False) -> None:
    """Print plain text on stdout, or on stderr."""
    click.echo(harmless(text), nl=nl, err=err)


def note(message: str) -> None:
    """Say something about the work on stderr."""
    _stderr.print(harmless(message))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], texts: Collection[str] = ()) -> None:
    """Print a titled table on stdout; numbers are aligned to the right, the first column and `texts` to the left."""
    result = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        result.add_column(_text(column), justify="right" if i and column not in texts else "left")
    for row in rows:
        result.add_row(*map(_text, row))
    stdout = Console(width=None if sys.stdout and sys.stdout.isatty() else PLAIN_WIDTH)
    stdout.print(_text(title, style="bold"), result)


def _text(cell: object, style: str = "") -> Text:
    """Return what is shown as it is: no markup, and nothing that a terminal obeys."""
    return Text(harmless(str(cell)), style)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far the work is: a bar on a terminal, a line every few seconds elsewhere.

    Yields:
        `advance(n)`, to be called after every n steps.
    """
    if not _stderr.is_terminal:
        yield _PlainProgress(description, total).advance
        return
    columns = (
        TextColumn(f"{{task.description:<{DESCRIPTION_WIDTH}}}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=_stderr) as bar:
        task = bar.add_task(harmless(description), total=total)
        yield lambda n: bar.advance(task, n)


REPORTER = Reporter(note, progress)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else _rate(speed))


def _rate(per_second: float) -> str:
    return f"{per_second:.0f}/s" if per_second >= 100 else f"{per_second:.3g}/s"


class _PlainProgress:
    """Prints `description: done/total, rate, time left`, seldom."""

    def __init__(self, description: str, total: int) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self.start = self.last = time.monotonic()

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if self.done >= self.total or now - self.last >= PLAIN_INTERVAL_S:
            self.last = now
            note(self._line(now - self.start))

    def _line(self, elapsed_s: float) -> str:
        rate = self.done / max(elapsed_s, 1e-9)
        left = "done" if self.done >= self.total else f"{(self.total - self.done) / rate:.0f} s left"
        return f"{self.description}: {self.done}/{self.total}, {_rate(rate)}, {left}"
