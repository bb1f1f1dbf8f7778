"""The training log: JSON lines on disk, the same lines on stderr."""

import json
import sys
import time
from pathlib import Path


class TrainingLog:
    """Append records to a JSON-lines file, with the seconds since the run began.

    Args:
        path: The file; an earlier run's records are kept and its clock goes on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        earlier = self.records()
        self._start = time.monotonic() - (float(str(earlier[-1]["seconds"])) if earlier else 0.0)

    def write(self, **record: object) -> None:
        """Append one record; floats are rounded to four digits."""
        record["seconds"] = round(time.monotonic() - self._start, 1)
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()})
        with self._path.open("a") as file:
            file.write(line + "\n")
        sys.stderr.write(line + "\n")

    def records(self) -> list[dict[str, object]]:
        """Return all records, oldest first."""
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []
