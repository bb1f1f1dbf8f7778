"""The state between commands: which checkpoint is the current one, in ./.dpn/current.json."""

import json
from pathlib import Path

from dpn_cli.checkpoint.workplace import workplace
from dpn_cli.checkpoint.writer import replace_file, write_json
from dpn_cli.errors import UsageError

FOLDER = Path(".dpn")  # of the current directory
STATE_FILE = FOLDER / "current.json"
PATIENCE_S = 10.0  # with another run, which needs milliseconds


def check_current_folder() -> None:
    """Check that the current folder exists, without which much that is called works no more.

    Raises:
        UsageError: if it was removed.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError("the current folder was removed: change to another one first (cd)") from None


def check_state_folder() -> None:
    """Check that what is written and deleted under .dpn is in this directory, which may be a stranger's.

    Raises:
        UsageError: if there is a symbolic link, a pipe or a device.
    """
    for path in (FOLDER, *FOLDER.glob("*"), *FOLDER.glob("*/*")):
        if path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir())):
            what = "a symbolic link" if path.is_symlink() else "neither a file nor a folder"
            raise UsageError(f"{path} is {what}, expected dpn's own file or folder: remove it")


def remember(path: Path) -> None:
    """Make `path` the current checkpoint of this directory, after another run that is doing so."""
    FOLDER.mkdir(exist_ok=True)
    refusal = f"{STATE_FILE} is being written by {{holder}}"
    with workplace(STATE_FILE, refusal, "pass --model DIR", PATIENCE_S) as work:
        replace_file(STATE_FILE, lambda stage: write_json(stage, {"checkpoint": str(path.resolve())}), work)


def current(model: Path | None) -> Path:
    """Return `model` if given, else the current checkpoint.

    Raises:
        UsageError: if there is none, or it is gone; or if .dpn leads elsewhere.
    """
    check_state_folder()
    if model is not None:
        return model
    try:
        path = Path(json.loads(STATE_FILE.read_text(encoding="utf-8"))["checkpoint"])
    except FileNotFoundError:
        raise UsageError(
            "there is no current checkpoint here: run `dpn convert MODEL` first, or pass --model DIR"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{STATE_FILE} is damaged: delete it and pass --model DIR") from None
    if not path.is_dir():
        raise UsageError(f"the current checkpoint {path} is gone: run `dpn convert MODEL` again, or pass --model DIR")
    return path
