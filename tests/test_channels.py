"""stdout and stderr in all the states that a command finds them in: results are kept, and the exit code says so."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import NoReturn

import pytest

from dpn_cli import channels, cli, console


class Full(StringIO):
    """A stream that nothing can be written to."""

    def write(self, text: str) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def export(converted: Path, folder: Path, redirection: str) -> "subprocess.CompletedProcess[str]":
    """Export to `out`, with streams as a shell makes them: of what writes results and files, it begins fastest."""
    line = [sys.executable, "-m", "dpn_cli", "export", "--model", str(converted), "-o", "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *line]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        pytest.param(
            ">&-",
            1,
            "stdout cannot be written (Bad file descriptor): the results are not shown; files that were",
            marks=pytest.mark.slow,
        ),
        (">/dev/full", 1, "stdout cannot be written (No space left on device): the results are not shown"),
        pytest.param("2>/dev/full", 0, "", marks=pytest.mark.slow),
        ("<&- >&- 2>&-", 1, ""),
    ],
)
def test_streams_that_cannot_be_written_cost_no_work(
    make_converted: Callable[..., Path], tmp_path: Path, redirection: str, code: int, error: str
) -> None:
    done = export(make_converted(), tmp_path, redirection)
    assert done.returncode == code
    assert error in done.stderr and "Traceback" not in done.stderr
    assert ("tiny-dpn → out" in done.stdout) is (code == 0)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_reader_that_is_gone_costs_no_work(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    done = export(make_converted(), tmp_path, "| true")
    assert done.stderr.startswith("writing weights: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_that_lacks_characters_costs_no_results(
    tiny_llava: Path, tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "modèle → 模型 😀"
    folder.symlink_to(tiny_llava)
    for options in ([], ["--json"]):
        written = BytesIO()
        with TextIOWrapper(written, encoding=encoding) as stdout, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", stdout)
            assert cli.main(["inspect", str(folder), *options]) == 0
            text = written.getvalue().decode(encoding)
    assert json.loads(text)["checkpoint"] == str(folder), "JSON stays what it is"


def test_a_terminal_that_is_gone_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    silenced: list[int] = []
    monkeypatch.setattr(channels, "silence", lambda *numbers: silenced.extend(numbers))
    monkeypatch.setattr("sys.stderr", Full())
    console.note("a message")
    console.error("an error")
    with console.progress("work", total=2) as advance:
        advance(2)
    assert set(silenced) == {channels.STDERR}
