"""Write a folder whole or not at all: fill a hidden sibling, sync it to disk, rename it into place.

A lock beside the target keeps two runs apart.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal

from dpn_cli.checkpoint.headers import read_config
from dpn_cli.checkpoint.links import is_text
from dpn_cli.checkpoint.locks import to_be_replaced
from dpn_cli.checkpoint.workplace import OLD, workplace
from dpn_cli.errors import CheckpointError, DpnError, UsageError
from dpn_cli.reporter import SILENT, Reporter

MARGIN_BYTES = 64 << 20  # for the small files beside the weights


@contextmanager
def staged_folder(
    target: Path, force: bool, may_replace: str, source: Path | None = None, reporter: Reporter = SILENT
) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        target: the folder to write; its parents are made.
        force: replace a target that exists, once the new one is complete.
        may_replace: Start of the model types of folders that `force` may replace.
        source: the input, which the target must not touch.
        reporter: is told of the time that the disk takes.

    Raises:
        UsageError: if the target exists (without force), is not ours to replace, or overlaps the source; or if another
            run is writing it.
        DpnError: if nothing can be written there.
    """
    check_target(target, force, may_replace, source)
    target = Path(os.path.realpath(target))  # a loop of links, too, is no error yet
    refusal = f"{target} is being written by " + "{holder}: wait for it to finish, or choose another --output"
    with workplace(target, refusal, "choose another --output") as work, to_be_replaced(target):
        check_target(target, force, may_replace, source)
        stage = work / "stage"
        stage.mkdir()
        yield stage
        with reporter.waiting("syncing to disk"):
            sync_folder(stage)
        _put_in_place(stage, target, force, work / OLD)
        sync_entry(target.parent)


def check_target(target: Path, force: bool, may_replace: str, source: Path | None = None) -> None:
    """Check that `target` may be written; see `staged_folder`.

    Raises:
        UsageError: if it may not.
    """
    if source is not None:
        real, real_source = (Path(os.path.realpath(path)) for path in (target, source))
        if real.is_relative_to(real_source) or real_source.is_relative_to(real):
            raise UsageError(f"the output {target} overlaps the input {source}: choose another --output")
    if not is_text(target):
        raise UsageError(f"the output {target} has a name that is not UTF-8, which no loader opens: choose another")
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
    folder = _existing_parent(target)
    free, needed = shutil.disk_usage(folder).free, needed_bytes + MARGIN_BYTES
    if free < needed:
        raise DpnError(
            f"{folder} has {decimal(free)} free, {target.name} needs {decimal(needed)}: free some space or choose "
            "another --output"
        )


def on_same_disk(source: Path, target: Path) -> bool:
    """Say whether a file and a folder to be written are on one file system."""
    return source.stat().st_dev == _existing_parent(target).stat().st_dev


def _existing_parent(target: Path) -> Path:
    folder = Path(os.path.realpath(target)).parent
    while not folder.exists():
        folder = folder.parent
    return folder


def _is_ours(folder: Path, prefix: str) -> bool:
    try:
        return str(read_config(folder).get("model_type")).startswith(prefix) or not any(folder.iterdir())
    except CheckpointError:
        return not any(folder.iterdir())


def _put_in_place(stage: Path, target: Path, force: bool, old: Path) -> None:
    if not os.path.lexists(target):
        stage.rename(target)
        return
    if not force:
        raise UsageError(
            f"{target} has appeared in the meantime: choose another --output, or pass --force to replace it"
        )
    target.rename(old)
    stage.rename(target)


def sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, with all that is in it."""
    for directory, _, files in os.walk(folder):
        for name in files:
            sync_entry(Path(directory, name))
        sync_entry(Path(directory))


def sync_entry(path: Path) -> None:
    """Sync one file, or the names in one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
