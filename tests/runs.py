"""Calibrations as processes of their own, to be watched and disturbed, and pictures for tests."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DEADLOCK_S = 120  # beyond this something hangs
POLL_S = 0.005
FEW: Mapping[str, Any] = {  # settings of `calibration`: as little as every stage of it can do with
    "samples": 16, "epochs": 4, "batch_size": 8, "answer_tokens": 2, "holdout": 0.25,
    "survey": {"samples": 2, "routes": 3, "width": 1, "experts": ("pool", "guided")},
    "predictors": {"samples": 1, "epochs": 2},
}  # fmt: skip


def options(settings: Mapping[str, Any], path: str = "calibration") -> list[str]:
    """Return settings as options of a command line."""
    words = []
    for name, value in settings.items():
        key = f"{path}.{name}"
        words += options(value, key) if isinstance(value, Mapping) else ["--set", f"{key}={json.dumps(value)}"]
    return words


def start(arguments: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dpn_cli", *arguments]
    pipe, variables = subprocess.PIPE, {**os.environ, **environment}
    options: dict[str, Any] = {"env": variables, "preexec_fn": heed_signals}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)


def heed_signals() -> None:
    """Undo what a shell, `nohup` or CI leaves ignored in the programs that it starts."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(process: "subprocess.Popen[str]", found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLOCK_S
    while not found():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


def measured(folder: Path, count: int) -> bool:
    return len(list((folder / "calibration" / "state").glob("batch-*"))) >= count


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def noise_pictures(folder: Path, count: int) -> Path:
    """Fill a folder with pictures that have no answers, so that the teacher is asked too."""
    pixels = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(pixels.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


def png(colour: str = "red") -> bytes:
    """Return the file of a small picture of one colour."""
    buffer = BytesIO()
    Image.new("RGB", (20, 30), colour).save(buffer, format="PNG")
    return buffer.getvalue()
