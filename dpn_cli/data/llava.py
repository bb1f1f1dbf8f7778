"""LLaVA's files: rows of JSON, with image paths that start in a folder."""

from pathlib import Path
from typing import Any

from dpn_cli.data.formats import Request, only_file
from dpn_cli.data.jsonrows import SUFFIXES, JsonRows, key_of_rows
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading
from dpn_cli.data.rowsource import RowSource


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
        """Return a row."""
        return self.rows.row(index)


def open_llava(request: Request) -> LlavaFile | None:
    """Open a file of rows, or the one of a folder.

    Raises:
        DataError: if there are several in the folder.
    """
    path = only_file(request, SUFFIXES, lambda path: key_of_rows(path) is not None)
    return LlavaFile(path, request.places, request.reading) if path else None
