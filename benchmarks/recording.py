"""What a new user sees: the README's commands on the embedded teacher, in a terminal of a given size, as text.

    python benchmarks/recording.py --columns 80 --rows 24

Before every line stands the second in which it appeared; lines that others have replaced since, such as those of
progress bars, are marked with ~. Below every command stands the longest time in which nothing changed on the screen
(on a machine that has nothing else to do), and the number of lines that end within a word.
"""

import codecs
import fcntl
import os
import pty
import select
import shlex
import struct
import sys
import termios
import time
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

import click
from terminal import Screen

from dpn_cli import console
from dpn_cli.console import DESCRIPTION_WIDTH
from dpn_cli.demo.pictures import samples
from dpn_cli.errors import DpnError

PICTURE = "picture.png"
BURST_S = 0.02  # without output, after which what is on the screen is looked at
COMMANDS = {  # each with what makes it short
    "dpn recipes": "",
    "dpn recipes demo": "",
    "dpn data demo": "--samples 16",
    "dpn convert demo": "",
    "dpn calibrate --data demo --budget 0.25": "--samples 32",
    "dpn inspect": "",
    "dpn data demo --samples 100": "",
    f'dpn run --image {PICTURE} "what is the background colour ?"': "",
    "dpn eval --data demo --budget 0.5 --samples 100": "--samples 16",
    "dpn eval --data demo --budget 0.5 --samples 100 --against all": "--samples 16",
    "dpn bench --budget 0.44 --against fastv,pyramiddrop": "--rounds 2",
    "dpn export": "",
    "dpn demo": "--samples 32 --questions 32",
}


@dataclass
class Recording:
    """What a screen has shown.

    Attributes:
        screen: The screen.
        started: Time of the start, in seconds.
        appeared: For every row, when it appeared, in seconds from the start.
        replaced: Lines that are gone, with when they appeared.
        silence: The longest time without a change, in seconds, and when it began.
    """

    screen: Screen
    started: float
    appeared: list[float] = field(default_factory=list)
    replaced: list[tuple[float, str]] = field(default_factory=list)
    silence: tuple[float, float] = (0.0, 0.0)
    _shown: list[str] = field(default_factory=list)
    _changed: float = 0.0

    def look(self, *, at_end: bool = False) -> None:
        """Note what has changed on the screen."""
        now, rows = time.monotonic() - self.started, self.screen.rows
        if rows == self._shown and not at_end:
            return
        self.silence = max(self.silence, (now - self._changed, self._changed))
        for i, (before, after) in enumerate(zip(self._shown, rows, strict=False)):
            if not after.startswith(before[:DESCRIPTION_WIDTH]):
                self.replaced.append((self.appeared[i], before))
            if before[:DESCRIPTION_WIDTH] != after[:DESCRIPTION_WIDTH]:
                self.appeared[i] = now
        self.appeared += [now] * (len(rows) - len(self.appeared))
        self._shown, self._changed = rows, now

    def lines(self) -> list[str]:
        """Return all lines in the order in which they appeared, each with its time."""
        rows = "\n".join(self.screen.rows).rstrip().split("\n")
        shown = [(at, f"{at:6.1f} | {row}") for at, row in zip(self.appeared, rows, strict=False)]
        gone = [(at, f"{at:6.1f} ~ {row}") for at, row in self.replaced]
        return [line.rstrip() for _, line in sorted(gone + shown, key=lambda each: each[0])]


def record(command: str, width: int, height: int) -> tuple[Recording, int]:
    """Run a command in a pseudo-terminal; return what it showed, and its exit code."""
    recording = Recording(Screen(width, height), time.monotonic())
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        sized = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        _, *words = shlex.split(command)
        os.execvpe(sys.executable, [sys.executable, "-m", "dpn_cli", *words], {**sized, "TERM": "xterm-256color"})
    while True:
        if not select.select([terminal], [], [], BURST_S)[0]:
            recording.look()
            continue
        try:
            rest = recording.screen.write(rest + decoder.decode(os.read(terminal, 1 << 16)))
        except OSError:  # how Linux says that the child has closed its end
            break
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    recording.look(at_end=True)
    return recording, code


@click.command()
@click.option("--columns", type=click.IntRange(1), default=80, show_default=True, help="Columns of the terminal.")
@click.option("--rows", type=click.IntRange(1), default=24, show_default=True, help="Rows of the terminal.")
@click.option("--only", metavar="WORD", default="", help="Only the commands that contain this.")
@click.option("--small", is_flag=True, help="A handful of samples: to see that every command runs.")
def main(columns: int, rows: int, only: str, small: bool) -> None:
    """Record all commands, one after the other in one folder."""
    with TemporaryDirectory() as work:
        os.chdir(work)
        next(iter(samples("heldout", 1))).image.save(PICTURE)
        for command, short in COMMANDS.items():
            if only not in command:
                continue
            line = f"{command} {short}".strip() if small else command
            console.note(line)
            recording, code = record(line, columns, rows)
            console.echo("\n".join([f"$ {line}", *recording.lines()]))
            silence, since = recording.silence
            seconds, cut = time.monotonic() - recording.started, len(recording.screen.cut)
            console.echo(
                f"# exit code {code} after {seconds:.1f} s; longest silence: {silence:.1f} s, from {since:.1f} s on; "
                f"lines that end within a word: {cut}\n"
            )
            if code:
                raise DpnError(f"{line} ended with exit code {code}")


if __name__ == "__main__":
    main()
