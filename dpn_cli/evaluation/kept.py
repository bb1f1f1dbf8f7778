"""What an evaluation has found so far, on disk: a killed run goes on where it stopped."""

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpn_cli import workspace
from dpn_cli.calibration.state import KeptFiles
from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.writer import write_json

FOLDER = workspace.FOLDER / "evaluation"


class KeptResults:
    """Batches of plain data, each in a file of its own that is there whole or not at all.

    The folder is named by what the results depend on, so that another evaluation finds none of them.
    """

    def __init__(self, depends_on: dict[str, Any], root: Path = FOLDER) -> None:
        """Find the results of an earlier run.

        Raises:
            UsageError: if .dpn leads elsewhere.
        """
        workspace.check_state_folder()
        self.root = root
        self.folder = root / _digest(json.dumps(depends_on, sort_keys=True))

    def of(self, what: str) -> KeptFiles[list[Any]]:
        """Return the batches of one kind of result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return KeptFiles(
            self.folder,
            f"{_digest(what)}-{{:06d}}.json",
            read=lambda path: list(read_json(path)["results"]),
            write=lambda path, results: write_json(path, {"results": results}),
        )

    def drop(self) -> None:
        """Forget everything, and the folders that are empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self.root, self.root.parent:
            with suppress(OSError):
                parent.rmdir()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
