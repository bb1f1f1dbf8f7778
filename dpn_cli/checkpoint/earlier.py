"""Results that newer ones replace are kept beside them, so that no run loses what an earlier one has found."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from dpn_cli.checkpoint.staging import sync_entry, sync_folder
from dpn_cli.errors import DpnError

FOLDER = "earlier"  # in that of the results: one numbered folder for every time that they were replaced


def keep_earlier(files: Iterable[Path], folder: Path, work: Path) -> Path:
    """Copy files that are about to be replaced; return the folder with the copies, which appears whole or not at all.

    Args:
        files: Files to copy; those that do not exist are passed over.
        folder: Folder of the results.
        work: Folder for what is unfinished, on the same disk.

    Raises:
        DpnError: if something else has the name of the folder with the copies.
    """
    stage = work / FOLDER
    stage.mkdir()
    for file in files:
        if file.is_file():
            shutil.copyfile(file, stage / file.name)
    sync_folder(stage)
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
    except FileExistsError:
        raise DpnError(f"{folder / FOLDER} is not a folder: rename or delete it, and run the command again") from None
    taken = [int(path.name) for path in (folder / FOLDER).iterdir() if path.name.isdecimal()]
    kept = folder / FOLDER / str(max(taken, default=0) + 1)
    stage.rename(kept)
    sync_entry(kept.parent)
    return kept
