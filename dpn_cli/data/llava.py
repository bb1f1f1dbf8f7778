"""LLaVA's files: a JSON list of rows, or one row per line, with image paths that start in a folder."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpn_cli.data.faults import RowError
from dpn_cli.data.formats import Request, only_file
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading
from dpn_cli.data.rowsource import RowSource
from dpn_cli.errors import DataError

_SUFFIXES = {".json", ".jsonl"}
_DECODER = json.JSONDecoder()
_BEGINNING = 4096  # characters
_LIST_OF_OBJECTS = re.compile(r"\[\s*\{")
_SPACE = re.compile(r"[ \t\r\n]*")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)


def holds_rows(path: Path) -> bool:
    """Tell from its beginning whether a .json or .jsonl file is one of rows, not of settings."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            start = file.read(_BEGINNING).lstrip()
    except OSError:
        return False
    return bool(_LIST_OF_OBJECTS.match(start)) or (path.suffix.lower() == ".jsonl" and start.startswith("{"))


class LlavaFile(RowSource):
    """The rows of a .json or .jsonl file, kept as text and decoded one at a time."""

    def __init__(self, path: Path, places: Places, reading: Reading) -> None:
        """Read the file and find where its rows are.

        Raises:
            DataError: if it is not text, neither a list of rows nor one row per line, or without a field to be ignored.
        """
        self.name = str(path)
        try:
            self.text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
        start = _skip_space(self.text, 0)
        is_list = self.text[start : start + 1] == "["
        self.spans = list(self._list_rows(start) if is_list else self._lines())
        if not self.spans:
            raise DataError(f"{path} holds no rows")
        try:
            first = self.row(0)
        except RowError:
            first = None
        if not is_list and path.suffix == ".json" and (first is None or len(self.spans) == 1):
            raise DataError(f"{path} holds no JSON list of conversations: expected [{{…}}, …], or one row per line")
        super().__init__(self.name, "LLaVA JSON" if is_list else "LLaVA JSON lines", places, reading)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.spans)

    def number(self, index: int) -> int:
        """Return the row's number in a list, or its line in a file of lines."""
        return self.spans[index][0]

    def outlines(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are objects."""
        for index in range(len(self)):
            with suppress(RowError):
                if isinstance(row := self.row(index), dict):
                    yield row

    def row(self, index: int) -> Any:
        """Return a row."""
        _, start, end = self.spans[index]
        try:
            return json.loads(self.text[start:end])
        except json.JSONDecodeError as error:
            position = start + error.pos
            hint = "; is there a comma too many?" if self.text[start:position].rstrip().endswith(",") else ""
            where = f"{error.msg}, line {self._line(position)}"
            raise RowError("not JSON", f"{where}{hint}" if start < end else "a comma is followed by no row") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits, or nested too deeply
            raise RowError("not JSON", str(error)) from None

    def _line(self, position: int) -> int:
        return self.text.count("\n", 0, position) + 1

    def _lines(self) -> Iterator[tuple[int, int, int]]:
        """Yield (line number, start, end) of every line that is not blank."""
        start = number = 0
        while start < len(self.text):
            number += 1
            end = self.text.find("\n", start)
            end = len(self.text) if end == -1 else end
            if _skip_space(self.text, start) < end:
                yield number, start, end
            start = end + 1

    def _list_rows(self, start: int) -> Iterator[tuple[int, int, int]]:
        """Yield (number, start, end) of every row of the list at `start`, bad ones too where they can be told apart.

        Raises:
            DataError: if no end of a row can be found.
        """
        number, position = 0, _skip_space(self.text, start + 1)
        while self.text[position : position + 1] != "]":
            number += 1
            end = self._end(number, position)
            yield number, position, end
            position = _skip_space(self.text, end)
            if self.text[position : position + 1] == ",":
                position = _skip_space(self.text, position + 1)
                if self.text[position : position + 1] == "]":
                    yield number + 1, position, position  # the comma after the last row: a row that is not there
            elif self.text[position : position + 1] != "]":
                raise self._broken(number, position, "no comma and no ] follows it")
        if _skip_space(self.text, position + 1) < len(self.text):
            raise self._broken(number, position + 1, "more text follows the list")

    def _end(self, number: int, start: int) -> int:
        """Return where a row ends: by its grammar, or, if that is broken, by its brackets."""
        try:
            return _DECODER.raw_decode(self.text, start)[1]
        except (ValueError, RecursionError):
            depth = 0
            for match in _BRACKETS.finditer(self.text, start):
                depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match[0], 0)
                if depth == 0 and match.start() > start:
                    return match.end()
                if depth <= 0:
                    break
        raise self._broken(number, start, "it has no end")

    def _broken(self, number: int, position: int, what: str) -> DataError:
        return DataError(f"{self.name} is not JSON: row {number}, line {self._line(position)}: {what}")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def open_llava(request: Request) -> LlavaFile | None:
    """Open a file of rows, or the one of a folder.

    Raises:
        DataError: if there are several in the folder.
    """
    path = only_file(request, _SUFFIXES, holds_rows)
    return LlavaFile(path, request.places, request.reading) if path else None
