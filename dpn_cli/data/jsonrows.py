"""Rows as JSON text: a list of objects, an object that holds one, an object of objects, or one object per line."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from dpn_cli.data.faults import RowError, unreadable
from dpn_cli.data.fields import asks, assign, image_fields, is_blank, is_image
from dpn_cli.data.spans import Spans
from dpn_cli.errors import DataError
from dpn_cli.notation import some

SUFFIXES = {".json", ".jsonl"}
_DECODER = json.JSONDecoder()
_BEGINNING = 1 << 16  # characters
_BLOCK = 1 << 16  # characters between which line ends are counted once
_LIST_OF_OBJECTS = re.compile(r"\[\s*\{")
_SPACE = re.compile(r"[ \t\r\n]*")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.?)*+(?:"|\Z)|[{}\[\]]', re.DOTALL)  # a string without an end goes to the last
_EXPECTED = (
    'expected [{…}, …], an object with one such list, as {"data": [{…}, …]}, an object of rows by their ids, as '
    '{"1": {…}, …}, or one row per line'
)


def key_of_rows(path: Path) -> str | None:
    """Return the key of the list of rows that a file begins with, empty if it needs none; None if it has no rows."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            text = file.read(_BEGINNING)
    except OSError:
        return None
    start = _skip_space(text, 0)
    if _LIST_OF_OBJECTS.match(text, start) or (path.suffix.lower() == ".jsonl" and text.startswith("{", start)):
        return ""
    wrapped = _wrapped_list(text, start)
    return wrapped[0][-1] if wrapped else None


class JsonRows:
    """The rows of a file, kept as text and decoded one at a time.

    Attributes:
        name: Path of the file.
        kind: Description of the layout.
        about: What stands beside the list of rows in an object that wraps it.
    """

    def __init__(self, path: Path) -> None:
        """Read the file and find where its rows are.

        Raises:
            DataError: if it is not text, or holds no rows.
        """
        self.name = str(path)
        self.about: dict[str, Any] = {}
        self._ids: Sequence[str] = ()  # of rows that are the values of an object
        self._has_broken_rows = False
        try:
            self.text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(path, error) from None
        start = _skip_space(self.text, 0)
        wrapped = _wrapped_list(self.text, start) if path.suffix.lower() == ".json" else None
        if self.text.startswith("[", start):
            self.kind, self.spans = "JSON", self._only_list(start)
        elif wrapped is not None:
            self.kind, self.spans = f"JSON, key {wrapped[0][-1]!r}", self._wrapped_rows(*wrapped)
        elif path.suffix.lower() == ".json" and (keyed := _keyed(self.text, start)):
            self.kind, (self._ids, self.spans) = "JSON, rows by id", keyed
        else:
            self.kind, self.spans = "JSON lines", self._lines()
        if not self.spans:
            raise DataError(f"{path} holds no rows")
        if self.kind == "JSON lines" and path.suffix == ".json" and (len(self) == 1 or not any(self.objects())):
            raise DataError(f"{path} holds no JSON list of rows: {_EXPECTED}")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.spans)

    def number(self, index: int) -> int:
        """Return the row's number in a list, or its line in a file of lines."""
        return self.spans[index][0]

    def row(self, index: int) -> Any:
        """Return a row.

        Raises:
            RowError: if it is not JSON.
        """
        _, start, end = self.spans[index]
        try:
            row = json.loads(self.text[start:end])
            return _named(self._ids[index], row) if self._ids else row
        except json.JSONDecodeError as error:
            position = start + error.pos
            hint = "; is there a comma too many?" if self.text[start:position].rstrip().endswith(",") else ""
            where = f"{error.msg}, line {self._line(position)}"
            raise RowError("not JSON", f"{where}{hint}" if start < end else "a comma is followed by no row") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits, or nested too deeply
            raise RowError("not JSON", str(error)) from None

    def objects(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are objects."""
        for index in range(len(self)):
            with suppress(RowError):
                if isinstance(row := self.row(index), dict):
                    yield row

    def _line(self, position: int) -> int:
        block = position // _BLOCK
        return 1 + self._line_ends[block] + self.text.count("\n", block * _BLOCK, position)

    @cached_property
    def _line_ends(self) -> list[int]:
        """The number of lines that end before each block of the text."""
        blocks = range(0, len(self.text), _BLOCK)
        return list(accumulate((self.text.count("\n", start, start + _BLOCK) for start in blocks), initial=0))

    def _lines(self) -> Spans:
        """Return the lines that are not blank."""
        spans = Spans()
        number, end = 1, 0
        while (start := _skip_space(self.text, end)) < len(self.text):
            number += self.text.count("\n", end, start)
            end = self.text.find("\n", start)
            end = len(self.text) if end == -1 else end
            spans.append(number, start, end)
        return spans

    def _only_list(self, start: int) -> Spans:
        """Return the rows of the list at `start`, after which no text may follow."""
        spans, end = self._list(start)
        if _skip_space(self.text, end) < len(self.text):
            raise self._broken(len(spans), end, "more text follows the list")
        return spans

    def _wrapped_rows(self, keys: list[str], start: int) -> Spans:
        """Return the rows of the list at `start`, the last of these keys of an object; note what else it holds.

        Raises:
            DataError: if that is another list of rows, or no JSON.
        """
        spans, end = self._list(start)
        rest = self.text[_skip_space(self.text, end) :]
        try:
            before = json.loads(self.text[:start] + "null}")
            after = json.loads("{" + rest.removeprefix(","))
        except (ValueError, RecursionError):
            raise self._broken(len(spans), end, f"the object with the key {keys[-1]!r} does not end well") from None
        self.about = before | after
        lists = [keys[-1], *(key for key, value in after.items() if isinstance(value, list))]
        if len(lists) > 1:
            raise DataError(f"{self.name} holds several lists ({some(lists)}): expected one, of rows")
        if _is_row(self.about) and not _begins_with_row(self.text, start):
            raise DataError(f"{self.name} holds one row, {_EXPECTED}")
        return spans

    def _list(self, start: int) -> tuple[Spans, int]:
        """Return the rows of the list at `start`, bad ones too where they can be told apart, and where it ends.

        Raises:
            DataError: if no end of a row can be found.
        """
        spans = Spans()
        position = _skip_space(self.text, start + 1)
        while not self.text.startswith("]", position):
            number = len(spans) + 1
            end = self._end(number, position)
            spans.append(number, position, end)
            position = _skip_space(self.text, end)
            if self.text.startswith(",", position):
                position = _skip_space(self.text, position + 1)
                if self.text.startswith("]", position):
                    spans.append(number + 1, position, position)  # after the last comma: a row that is not there
            elif not self.text.startswith("]", position):
                raise self._broken(number, position, "no comma and no ] follows it")
        return spans, position + 1

    def _end(self, number: int, start: int) -> int:
        """Return where a row ends: by its grammar, or, from the first broken row on, by its brackets."""
        if not self._has_broken_rows:
            try:
                return _DECODER.raw_decode(self.text, start)[1]
            except (ValueError, RecursionError):
                self._has_broken_rows = True  # each such error counts the lines of all the text before it
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


def _wrapped_list(text: str, start: int) -> tuple[list[str], int] | None:
    """Return the keys of an object up to that of its first list of objects, and where that begins, if it does."""
    keys: list[str] = []
    position = start
    try:
        while text[position] in ("{", ",")[bool(keys)]:
            key, position = _DECODER.raw_decode(text, _skip_space(text, position + 1))
            keys.append(key)
            position = _skip_space(text, _skip_space(text, position) + 1)
            if _LIST_OF_OBJECTS.match(text, position):
                is_row = is_image(key) or (_is_row(keys) and not _begins_with_row(text, position))
                return None if is_row else (keys, position)
            _, position = _DECODER.raw_decode(text, position)
            position = _skip_space(text, position)
    except (ValueError, IndexError, RecursionError):
        pass
    return None


def _named(key: str, row: Any) -> Any:
    """Return a row that is the value of a key: its id, or the path of an image that the value says something about."""
    if not is_image(key):
        return {"id": key, **row}
    if isinstance(row, dict):
        return {**row, "image": key} if is_blank(row.get("image")) else row
    is_chat = isinstance(row, list) and any(isinstance(each, dict) for each in row)
    return {"image": key, "conversations" if is_chat else "caption": row}


def _keyed(text: str, start: int) -> tuple[list[str], Spans] | None:
    """Return the keys of an object whose values are rows, and where its rows are; None of another object."""
    keys: list[str] = []
    spans = Spans()
    position = start
    try:
        while text[position] == "{,"[bool(keys)]:
            key, position = _DECODER.raw_decode(text, _skip_space(text, position + 1))
            colon = _skip_space(text, position)
            begin = _skip_space(text, colon + 1)
            if not isinstance(key, str) or text[colon] != ":" or text[begin] not in ('{["' if is_image(key) else "{"):
                return None
            end = _DECODER.raw_decode(text, begin)[1]
            keys.append(key)
            spans.append(len(keys), begin, end)
            position = _skip_space(text, end)
        is_whole = text[position] == "}" and _skip_space(text, position + 1) == len(text)
    except (ValueError, IndexError, RecursionError):
        return None
    return (keys, spans) if keys and is_whole and not _is_row(keys) else None


def _begins_with_row(text: str, start: int) -> bool:
    """Tell whether the first object of the list at `start` is a row by itself: an image, and what is asked or said."""
    try:
        first, _ = _DECODER.raw_decode(text, _skip_space(text, start + 1))
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and bool(image_fields(first)) and asks(first)


def _is_row(keys: Iterable[str]) -> bool:
    """Tell whether keys of an object are those of a row, not of what stands beside a list of rows."""
    return bool(assign(keys).keys() - {"id"})
