"""What the commands show: messages and progress on stderr, tables and other results on stdout.

Paths, names, errors and answers may hold what a terminal obeys: here it is made visible.
"""

import json
import logging
import os
import re
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, cast

import click
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from dpn_cli import channels
from dpn_cli.reporter import Reporter

PLAIN_INTERVAL_S = 10.0
PLAIN_WIDTH = 200
EDGES, GAP = 4, 2  # blanks around a table, and between its columns
DESCRIPTION_WIDTH, BAR_WIDTH = 18, 28  # so that the bars of one command stand below each other, within 80 columns

# C0 and C1 but for the tab and the end of a line, what turns the direction of text, other ends of lines, and halves of
# characters, which cannot be written at all.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_UNITS, _NO_BREAK = re.compile(r"(?<=\d) (?=(?:s|ms|min|h|[kMG]?B)\b)"), "\0"
_formatwarning = warnings.formatwarning
_stderr = Console(file=cast("IO[str]", channels.Stderr()), highlight=False, markup=False, emoji=False, soft_wrap=True)
_log = logging.getLogger("dpn")
_handlers: list[logging.Handler] = []  # that messages go to as well
_DESCRIPTION = TextColumn(f"{{task.description:<{DESCRIPTION_WIDTH}}}", markup=False)
_hushed: list[int] = []  # stderr as it was before `hush`


def set_quiet(quiet: bool) -> None:
    """Silence messages and progress; results and errors stay."""
    _stderr.quiet = quiet


def log_to(path: str) -> None:
    """Append all messages, and what libraries log, to a file from now on.

    Raises:
        OSError: if it cannot be written.
    """
    _add_handler(_LogFile(path, encoding="utf-8"))


def show_logs() -> None:
    """Show what libraries log on stderr from now on."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.name != _log.name)  # messages are shown anyway
    _add_handler(handler)


def _add_handler(handler: logging.Handler) -> None:
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    _log.setLevel(logging.INFO)
    _handlers.append(handler)


def end_logs() -> None:
    """Close what `log_to` and `show_logs` have opened."""
    while _handlers:
        _remove_handler(_handlers[-1])


def _remove_handler(handler: logging.Handler) -> None:
    _handlers.remove(handler)
    logging.getLogger().removeHandler(handler)
    handler.close()


def hush() -> None:
    """Write nowhere from now on: another process of this run says the same."""
    end_logs()
    _hushed.append(os.dup(channels.STDERR))
    channels.silence(channels.STDOUT, channels.STDERR)


def speak_up() -> None:
    """Write to stderr again, since no other process says what follows."""
    while _hushed:
        descriptor = _hushed.pop()
        os.dup2(descriptor, channels.STDERR)
        os.close(descriptor)


def aloud(message: str) -> None:
    """Say something about the work even after `hush`, since no other process says it."""
    if not _stderr.quiet:
        with suppress(OSError):
            os.write(_hushed[0] if _hushed else channels.STDERR, f"{harmless(message)}\n".encode())


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


class _LogFile(logging.FileHandler):
    """A file for messages; where it cannot be written, the work goes on without it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say it once, and write no more."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif self in _handlers:
            _remove_handler(self)
            note(f"Note: the log file {self.baseFilename} cannot be written ({error.strerror}), so it ends here.")

    def close(self) -> None:
        """Close the file, even if what is left for it finds no room."""
        with suppress(OSError):
            super().close()


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return harmless(super().getMessage())


def echo(text: str, nl: bool = True, err: bool = False) -> None:
    """Print plain text on stdout, or on stderr."""
    with channels.messages() if err else channels.results():
        click.echo(harmless(text), sys.stderr if err else sys.stdout, nl)


def print_json(data: object) -> None:
    """Print plain data on stdout, as JSON for scripts and readers."""
    echo(json.dumps(data, indent=2, ensure_ascii=False))


def paragraph(text: str) -> None:
    """Print plain text on stdout, within the width of the terminal."""
    echo(_wrapped(harmless(text), _stdout_width()))


def note(message: str) -> None:
    """Say something about the work on stderr."""
    _log.info("%s", message)
    _stderr.print(_for_terminal(harmless(message)))


def error(message: str) -> None:
    """Say on stderr, however quiet, what went wrong."""
    if _handlers:  # without any, logging would write to stderr itself
        _log.error("%s", message)
    with channels.messages():
        click.echo(_for_terminal(harmless(message)), sys.stderr)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    texts: Collection[str] = (),
    legend: str = "",
) -> None:
    """Print a titled table on stdout, within the width of the terminal.

    Lines break at words, and after the commas of a route. Numbers are never cut: a table whose numbers need more than
    the terminal's width is wider.

    Args:
        title: Title above the table.
        columns: Heads of the columns.
        rows: the cells.
        texts: heads of the columns that, like the first one, are aligned to the left and may break; others are numbers.
        legend: Legend below the table.
    """
    stdout = Console(width=_stdout_width(), highlight=False)
    cells = [[harmless(str(cell)) for cell in row] for row in (columns, *rows)]
    breaks = [i == 0 or column in texts for i, column in enumerate(columns)]
    spans = [_span(column, can_break) for column, can_break in zip(zip(*cells, strict=True), breaks, strict=True)]
    widths = _shared(spans, stdout.width - EDGES - GAP * (len(columns) - 1))
    result = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    for head, width, can_break in zip(cells[0], widths, breaks, strict=True):
        result.add_column(_broken(head, width), justify="left" if can_break else "right")
    for row in cells[1:]:
        result.add_row(*map(_broken, row, widths))
    stdout.width = max(stdout.width, sum(widths) + EDGES + GAP * (len(columns) - 1))
    with channels.results():
        stdout.print(Text(_wrapped(harmless(title), stdout.width), "bold"), soft_wrap=True)
        stdout.print(result)
        if legend:
            stdout.print(Padding(Text(harmless(legend)), (0, 2, 1, 2), expand=False))


class _Breaks(textwrap.TextWrapper):
    """Breaks lines at blanks, and after the commas of a route."""

    wordsep_simple_re = re.compile(r"(\s+)|(?<=,)")


def _broken(cell: str, width: int) -> Text:
    """Return a cell as lines of a width, without markup."""
    breaks = _Breaks(width, break_on_hyphens=False)
    return Text("\n".join(line for part in cell.split("\n") for line in breaks.wrap(part) or [""]))


def _span(column: Sequence[str], can_break: bool) -> tuple[int, int]:
    """Return the least width of a column, head first, that cuts no word or number, and the one that breaks no line."""
    head, *cells = column
    most = max(cell_len(line) for cell in cells for line in cell.split("\n")) if cells else 0
    breaking = column if can_break else [head]
    least = max(cell_len(part or "") for cell in breaking for part in _Breaks.wordsep_simple_re.split(cell))
    return (least, max(most, cell_len(head))) if can_break else (max(least, most),) * 2


def _shared(spans: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Return the widths of columns in a room; where it is too small for the least widths, those that break no line."""
    left, wanted = room - sum(least for least, _ in spans), sum(most - least for least, most in spans)
    if left < 0 or wanted <= left:
        return [most for _, most in spans]
    return [least + (most - least) * left // wanted for least, most in spans]


def _stdout_width() -> int:
    return Console().width if sys.stdout.isatty() else PLAIN_WIDTH


def _for_terminal(message: str) -> str:
    """Break the lines of a message at words where stderr is a terminal; words that are too long stay whole."""
    return _wrapped(message, _stderr.width) if _stderr.is_terminal else message


def _wrapped(text: str, width: int) -> str:
    """Break the lines of a text at words, but not before a unit, and keep their indents."""
    lines = []
    for line in _UNITS.sub(_NO_BREAK, text).split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines).replace(_NO_BREAK, " ")


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far the work is: a bar on a terminal, a line every few seconds elsewhere.

    Yields:
        `advance(n)`, to be called after every n steps.
    """
    with _counting(description, total, MofNCompleteColumn(), str) as advance:
        yield advance


@contextmanager
def copying(description: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Show how far the work is as `progress` does, where it is counted in bytes."""
    with _counting(description, nbytes, DownloadColumn(), decimal) as advance:
        yield advance


@contextmanager
def _counting(
    description: str, total: int, column: ProgressColumn, write: Callable[[int], str]
) -> Iterator[Callable[[int], None]]:
    """Show how far the work is, its counts in a column of a terminal or written in lines."""
    if not _stderr.is_terminal:
        yield _PlainProgress(description, total, write).advance
        return
    with _live(column, _RateColumn(write)) as bar:
        task = bar.add_task(harmless(description), total=total)
        yield lambda n: bar.advance(task, n)


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Show on a terminal that something goes on, nobody knows for how long, and for how long it has."""
    _log.info("%s", description)
    if not _stderr.is_terminal:
        yield
        return
    with _live(transient=True) as bar:
        bar.add_task(harmless(description), total=None)
        yield


REPORTER = Reporter(note, progress, copying, waiting)


def _live(*columns: ProgressColumn, transient: bool = False) -> Progress:
    """Return a bar whose pace is that of all steps: a single one may take minutes."""
    shown = (_DESCRIPTION, BarColumn(BAR_WIDTH), *columns, _TimeColumn())
    return Progress(*shown, console=_stderr, speed_estimate_period=float("inf"), transient=transient)


class _TimeColumn(ProgressColumn):
    """The time left, which runs down between two steps; where it is not known, or over, the time taken."""

    def __init__(self) -> None:
        super().__init__()
        self._step = (0.0, 0.0)  # how far the task has come, and when

    def render(self, task: Task) -> Text:
        taken, left = task.elapsed or 0.0, task.time_remaining
        if task.completed != self._step[0]:
            self._step = task.completed, taken
        left = None if left is None else left - (taken - self._step[1])
        if task.finished or left is None or left <= 0:
            return Text(_clock(task.finished_time or taken))
        return Text(f"{_clock(left)} left")


class _RateColumn(ProgressColumn):
    """How much is done per second, or how long one takes."""

    def __init__(self, write: Callable[[int], str]) -> None:
        super().__init__()
        self._write = write

    def render(self, task: Task) -> Text:
        return Text(_rate(task.finished_speed or task.speed, self._write))


def _rate(speed: float | None, write: Callable[[int], str]) -> str:
    """Return so many a second as `12/s`, or as `3.4 s each` where it is fewer than one."""
    if not speed:
        return ""
    return f"{write(round(speed))}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


def _clock(seconds: float) -> str:
    """Return a time as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _PlainProgress:
    """Prints `description: done/total, time left`, seldom."""

    def __init__(self, description: str, total: int, write: Callable[[int], str]) -> None:
        self.description = description
        self.total = total
        self.write = write
        self.done = 0
        self.start = self.last = time.monotonic()

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if self.done >= self.total or now - self.last >= PLAIN_INTERVAL_S:
            self.last = now
            note(self._line(now - self.start))

    def _line(self, elapsed_s: float) -> str:
        counts = f"{self.description}: {self.write(self.done)}/{self.write(self.total)}"
        if not self.done:
            return counts
        if self.done >= self.total:
            return f"{counts}, done"
        speed = self.done / max(elapsed_s, 1e-9)
        return f"{counts}, {_rate(speed, self.write)}, {_clock((self.total - self.done) / speed)} left"
