"""kill -9 at a chosen file event: command lines in forks of one process that has imported everything."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
SAID = ("stdout", "stderr", "events")
HEAVY = [
    "dpn_cli.cli",
    "dpn_cli.conversion.convert",
    "dpn_cli.calibration.calibrate",
    "dpn_cli.evaluation.run",
    "dpn_cli.exporting.export",
    "peft",
]

_forks = get_context("forkserver")
_forks.set_forkserver_preload([*HEAVY, "dpn_cli.modeling.llava", __name__])


class _Killer:
    """Counts this process's changes of files under a folder, and kills it just before one of them."""

    def __init__(self, folder: Path, event: int | None) -> None:
        self.folder = f"{os.path.realpath(folder)}{os.sep}"
        self.event = event
        self.seen = 0
        sync, os.fsync = os.fsync, lambda file: (self._count(file), sync(file))[1]  # which is no event of an audit
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._count(arguments[0])
        elif event in EVENTS:
            at = arguments[-1] if event in {"os.remove", "os.rmdir"} else -1
            self._count(Path(f"/proc/self/fd/{at}" if at >= 0 else "", arguments[0]))

    def _count(self, path: Any) -> None:
        if os.path.realpath(f"/proc/self/fd/{path}" if isinstance(path, int) else path).startswith(self.folder):
            self.seen += 1
            if self.seen - 1 == self.event:
                os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Ended:
    """How a command line ended.

    Attributes:
        code: the exit code, negative for a signal.
        output: its stdout.
        errors: its stderr.
        events: number of file events.
    """

    code: int
    output: str
    errors: str
    events: int

    @property
    def was_killed(self) -> bool:
        """Whether it was killed, rather than ended by itself."""
        return self.code == -signal.SIGKILL


def run(line: Sequence[str], folder: Path, event: int | None = None) -> Ended:
    """Run `dpn LINE` in a folder; kill it before the file event of that number, counted from 0, in the folder."""
    with TemporaryDirectory() as said:
        process = _forks.Process(target=_run, args=(line, folder, event, Path(said)))
        process.start()
        process.join()
        code = process.exitcode
        assert code is not None
        output, errors, events = ((Path(said) / name).read_text() for name in SAID)
    return Ended(code, output, errors, int(events or 0))


def _run(line: Sequence[str], folder: Path, event: int | None, said: Path) -> None:
    from dpn_cli import cli

    os.chdir(folder)
    with ExitStack() as held:
        output, errors, events = (held.enter_context((said / name).open("w")) for name in SAID)
        held.enter_context(redirect_stdout(output))
        held.enter_context(redirect_stderr(errors))
        killer = _Killer(folder, event)
        code = cli.main(line)
        events.write(str(killer.seen))
    os._exit(code)
