"""The state between commands: which checkpoint is the current one, in ./.dpn/current.json."""

import json
import os
from pathlib import Path

from dpn_cli.errors import UsageError

STATE_FILE = Path(".dpn", "current.json")


def remember(path: Path) -> None:
    """Make `path` the current checkpoint of this directory."""
    STATE_FILE.parent.mkdir(exist_ok=True)
    stage = STATE_FILE.with_suffix(f".{os.getpid()}.tmp")
    stage.write_text(json.dumps({"checkpoint": str(path.resolve())}, ensure_ascii=False) + "\n", encoding="utf-8")
    stage.replace(STATE_FILE)


def current(model: Path | None) -> Path:
    """Return `model` if given, else the current checkpoint.

    Raises:
        UsageError: if there is none, or it is gone.
    """
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
