"""kill -9 at any moment, and two runs at once: the target is absent or complete, and the next run goes as ever."""

import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_checkpoint import make
from dpn_cli.cli import main
from dpn_cli.conversion.convert import convert

DPN = (sys.executable, "-m", "dpn_cli", "--quiet")
MOMENTS = 50
SEED = 4


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of 340 MB in 18 shards, `source`, and its conversion, `source-dpn`."""
    folder = tmp_path_factory.mktemp("large")
    text = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    make(folder / "source", text=text, vision=vision, shard_bytes=20_000_000)
    subprocess.run([*DPN, "convert", "source"], cwd=folder, check=True)
    return folder


def same(one: Path, other: Path) -> bool:
    """Say whether two folders hold the same files, byte for byte."""
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def start(*args: str, cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([*DPN, *args], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


class Fork:
    """A run in a fork of this process, which has imported what it needs; asked as a `Popen` is."""

    def __init__(self, *args: str, cwd: Path) -> None:
        self.said, said = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.chdir(cwd)
                with os.fdopen(said, "w") as stream, redirect_stdout(None), redirect_stderr(stream):
                    code = main(["--quiet", *args])
            finally:
                os._exit(code)
        os.close(said)

    def communicate(self) -> tuple[str, str]:
        with os.fdopen(self.said) as stream:
            text = stream.read()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return "", text


def finish(*args: str, cwd: Path) -> tuple[int, str]:
    process = start(*args, cwd=cwd)
    _, said = process.communicate()
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [("convert", "source"), ("export", "--model", "source-dpn", "--uncalibrated")], ids=lambda c: c[0]
)
def test_kill_at_any_moment(large: Path, command: tuple[str, ...]) -> None:
    target = large / "out"
    run = (*command, "--output", "out")
    before = {path.name for path in large.iterdir()}

    def undisturbed_s() -> float:  # again and again, as other work on the machine comes and goes
        began = time.monotonic()
        assert finish(*run, cwd=large) == (0, "")
        return time.monotonic() - began

    duration = undisturbed_s()
    undisturbed = target.rename(large / "undisturbed")
    moments = random.Random(SEED)
    killed = 0
    for i in range(MOMENTS):
        process = start(*run, cwd=large)
        time.sleep((i + moments.random()) / MOMENTS * duration)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if target.exists():
            assert same(target, undisturbed)
            assert finish(*run, cwd=large)[0] == 2  # it exists
        else:
            duration = undisturbed_s()
        assert same(target, undisturbed)
        assert {path.name for path in large.iterdir()} - before == {"undisturbed", "out"}
        shutil.rmtree(target)
    shutil.rmtree(undisturbed)
    assert killed > MOMENTS // 2, "the moments were not spread over the run"


@pytest.mark.slow
def test_of_two_runs_at_once_one_wins_whichever_is_ahead(large: Path) -> None:
    moments = random.Random(SEED)
    for _ in range(10):
        at_once(large, "source", head_start=moments.random() * 0.5)
        assert same(large / "out", large / "source-dpn")
        shutil.rmtree(large / "out")


def test_of_two_runs_at_once_one_wins(tiny_llava_factory: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_llava_factory(shards=2), tmp_path / "source")
    convert(str(tmp_path / "source"), output=tmp_path / "source-dpn")
    at_once(tmp_path, "source", begin=Fork)
    assert same(tmp_path / "out", tmp_path / "source-dpn")


def at_once(folder: Path, source: str, head_start: float = 0, begin: Callable[..., Any] = start) -> None:
    """Convert twice at once to `out`, and check that one of the runs does it and the other says why it does not."""
    first = begin("convert", source, "--output", "out", cwd=folder)
    time.sleep(head_start)
    second = begin("convert", source, "--output", "out", cwd=folder)
    said = {process.returncode: text for process, (_, text) in ((p, p.communicate()) for p in (first, second))}
    assert said.keys() == {0, 2}
    assert said[0] == ""
    assert "is being written by" in said[2] or "out exists" in said[2]
    assert said[2].count("\n") == 1
    assert {path.name for path in folder.iterdir()} == {source, f"{source}-dpn", "out", ".dpn"}
