"""LLaVA's files: rows of JSON, with image paths that start in a folder."""

from pathlib import Path
from typing import Any

from dpn_cli.data.coco import is_coco
from dpn_cli.data.formats import Request, only_file
from dpn_cli.data.jsonrows import SUFFIXES, JsonRows, key_of_rows
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading
from dpn_cli.data.rowsource import RowSource

_BODIES = ("body", "params", "request")  # of requests to batch APIs
_ADDRESS = {"method", "url"}  # of the API
_NAMES = {"input": "messages", "instructions": "system"}  # of OpenAI's Responses API


class LlavaFile(RowSource):
    """The rows of a .json or .jsonl file."""

    def __init__(self, path: Path, places: Places, reading: Reading) -> None:
        """Read the file.

        Raises:
            DataError: if it holds no rows, or no field that the user names.
        """
        self.rows = JsonRows(path)
        super().__init__(str(path), f"LLaVA {self.rows.kind}", places, reading)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def number(self, index: int) -> int:
        """Return the row's number in a list, or its line in a file of lines."""
        return self.rows.number(index)

    def row(self, index: int) -> Any:
        """Return a row; of a request to a batch API, what it asks."""
        return _unwrapped(self.rows.row(index))


def _unwrapped(row: Any) -> Any:
    """Return the body of a request, under the names that rows have, if the row is one.

    Sources: https://platform.openai.com/docs/guides/batch, https://docs.anthropic.com/en/docs/build-with-claude/batch-processing
    """
    if not isinstance(row, dict) or not ("custom_id" in row or row.keys() >= _ADDRESS):
        return row
    bodies = [row[key] for key in _BODIES if isinstance(row.get(key), dict)]
    address = _ADDRESS if row.keys() >= _ADDRESS else set()
    beside = {key: value for key, value in row.items() if key not in {*_BODIES, *address}}
    if len(bodies) != 1 or beside.keys() & bodies[0].keys():
        return row
    return beside | {_NAMES.get(key, key): value for key, value in bodies[0].items()}


def open_llava(request: Request) -> LlavaFile | None:
    """Open a file of rows, or the one of a folder.

    Raises:
        DataError: if there are several in the folder.
    """
    path = only_file(request, SUFFIXES, lambda path: key_of_rows(path) is not None and not is_coco(request, path))
    return LlavaFile(path, request.places, request.reading) if path and not is_coco(request, path) else None
