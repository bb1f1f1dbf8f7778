"""Write a folder whole or not at all: fill a hidden sibling, sync it to disk, rename it into place."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpn_cli.checkpoint.headers import read_config
from dpn_cli.errors import CheckpointError, DpnError, UsageError

STAGE, OLD = "stage", "old"
MARGIN_BYTES = 64 << 20  # for the small files beside the weights


@contextmanager
def staged_folder(target: Path, force: bool, may_replace: str, source: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        target: the folder to write; its parents are made.
        force: replace a target that exists, once the new one is complete.
        may_replace: the model_type of the folders that `force` may replace.
        source: the input, which the target must not touch.

    Raises:
        UsageError: if the target exists (without force), is not ours to replace, or overlaps the source.
    """
    _recover(target)
    check_target(target, force, may_replace, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = _sibling(target, STAGE)
    stage.mkdir()
    try:
        yield stage
        _sync(stage)
        _put_in_place(stage, target, force)
        _sync_entry(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_target(target: Path, force: bool, may_replace: str, source: Path | None = None) -> None:
    """Check that `target` may be written; see `staged_folder`.

    Raises:
        UsageError: if it may not.
    """
    if source is not None:
        real, real_source = target.resolve(), source.resolve()
        if real.is_relative_to(real_source) or real_source.is_relative_to(real):
            raise UsageError(f"the output {target} overlaps the input {source}: choose another --output")
    if not os.path.lexists(target):
        return
    if not force:
        raise UsageError(f"{target} exists: choose another --output, or pass --force to replace it")
    if target.is_symlink() or not target.is_dir() or not _is_ours(target, may_replace):
        raise UsageError(f"{target} was not written by dpn, so --force does not replace it: choose another --output")


def check_space(target: Path, needed_bytes: int) -> None:
    """Check that the disk of `target` has room for a new folder.

    Raises:
        DpnError: if it has not.
    """
    folder = target.resolve().parent
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, needed_bytes + MARGIN_BYTES
    if free < needed:
        raise DpnError(
            f"{folder} has {free / 1e9:.1f} GB free, {target.name} needs {needed / 1e9:.1f} GB: free some "
            "space or choose another --output"
        )


def _is_ours(folder: Path, model_type: str) -> bool:
    try:
        return read_config(folder).get("model_type") == model_type or not any(folder.iterdir())
    except CheckpointError:
        return not any(folder.iterdir())


def _put_in_place(stage: Path, target: Path, force: bool) -> None:
    if not target.exists():
        stage.rename(target)
        return
    if not force:
        raise UsageError(f"{target} appeared meanwhile: choose another --output, or pass --force to replace it")
    old = _sibling(target, OLD)
    target.rename(old)
    try:
        stage.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}.{socket.gethostname()}.{os.getpid()}"


def _recover(target: Path) -> None:
    """Sweep what dead processes left beside `target`; bring back a target caught between two names."""
    if not target.parent.is_dir():
        return
    host = socket.gethostname()
    for role in (OLD, STAGE):
        prefix = f".{target.name}.{role}.{host}."
        for path in target.parent.iterdir():
            pid = path.name.removeprefix(prefix)
            if not path.name.startswith(prefix) or not pid.isdecimal() or _is_alive(int(pid)):
                continue
            if role == OLD and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this process has not made its own yet
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    for directory, _, files in os.walk(folder):
        for name in files:
            _sync_entry(Path(directory, name))
        _sync_entry(Path(directory))


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
