"""What an evaluation has found so far, on disk: a killed run goes on where it stopped."""

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.writer import replace_file, write_json

FOLDER = Path(".dpn", "evaluation")


class KeptResults:
    """Plain data by name, each in a file of its own that is there whole or not at all.

    The folder is named by what the results depend on, so that another evaluation finds none of them.
    """

    def __init__(self, depends_on: dict[str, Any], root: Path = FOLDER) -> None:
        """Find the results of an earlier run; a damaged file is as good as none."""
        text = json.dumps(depends_on, sort_keys=True, default=str)
        self.root = root
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]

    def load(self, name: str) -> list[Any] | None:
        """Return what was kept under a name."""
        path = self.folder / f"{name}.json"
        try:
            return list(read_json(path)["results"])
        except Exception:  # noqa: BLE001 - missing, or damaged with a lost disk: found out again
            return None

    def keep(self, name: str, results: list[Any]) -> None:
        """Keep plain data under a name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / f"{name}.json", lambda path: write_json(path, {"results": results}))

    def drop(self) -> None:
        """Forget everything, and the folders that are empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self.root, self.root.parent:
            with suppress(OSError):
                parent.rmdir()
