"""What else than plain files a checkpoint's folder holds: links that lead out of it, pipes, devices. No torch.

A folder comes from a stranger as often as not, and a link in it makes somebody's own files part of what is copied,
published, changed or deleted.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from dpn_cli.errors import CheckpointError

WEIGHTS_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx"}
CALIBRATION_FOLDER = "calibration"  # what dpn writes and deletes inside of a converted folder
EVALUATION_FOLDER = "evaluation"  # the same of an exported one too
TEMPLATES_FOLDER = "additional_chat_templates"  # as transformers names it
_FOLDERS = (CALIBRATION_FOLDER, EVALUATION_FOLDER, TEMPLATES_FOLDER)


def check_links(folder: Path) -> None:
    """Check that whatever dpn reads or writes by way of a checkpoint's folder is inside of it.

    Weights may be links to another disk: of them nothing but the tensors that the config asks for is used, and they
    are never changed in place. So may the files of a snapshot in the hub's cache, which are links to its own blobs.
    Other folders than `_FOLDERS` are never entered, whatever they lead to.

    Raises:
        CheckpointError: if something leads out of it, or is neither a file nor a folder; names it.
    """
    real = Path(os.path.realpath(folder))
    inside = [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
    for path in _used(folder):
        if path.is_symlink() and path.suffix not in WEIGHTS_SUFFIXES:
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(place) for place in inside):
                raise CheckpointError(
                    f"{path} is a symbolic link out of its folder, to {target}: remove it, or put a copy in its place"
                )
        if _kind(path) not in (0, stat.S_IFREG):
            raise CheckpointError(
                f"{path} is neither a file nor a folder of its own: remove it, or download the checkpoint again"
            )


def is_text(path: Path) -> bool:
    """Say whether the name of a path, and of all folders above it, is UTF-8, as the libraries need that open it."""
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _used(folder: Path) -> Iterator[Path]:
    """Yield what is a file, or should be one: of folders, those under `_FOLDERS` that are links."""
    for path in folder.iterdir():
        if path.name not in _FOLDERS and _kind(path) != stat.S_IFDIR:
            yield path
    for own in (folder / name for name in _FOLDERS):
        if own.is_symlink():
            yield own
            continue
        for parent, folders, files in os.walk(own):
            yield from (Path(parent, name) for name in files)
            yield from (path for name in folders if (path := Path(parent, name)).is_symlink())


def _kind(path: Path) -> int:
    """Return what a path leads to, as in stat(2), or 0 where that is nothing that can be seen."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except OSError:
        return 0
