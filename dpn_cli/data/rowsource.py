"""What all tables of rows have in common, whatever file they come from."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from dpn_cli.data.faults import RowError
from dpn_cli.data.fields import (
    Fields,
    asks,
    assign,
    image_fields,
    known_names,
    lettered,
    mapping,
    present,
    validate_named,
)
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading, group, read_row
from dpn_cli.data.samples import ImageSource, Sample
from dpn_cli.errors import DataError

_LOOKED_AT = 100  # rows, to say which fields are read
_ASKED = 100_000  # rows, to say that none asks anything


class RowSource:
    """Rows that are read one at a time; images that they hold themselves are fetched again when they are opened.

    Attributes:
        name: Name of the data, as the user gave it.
        format: Description of the format, and of how the fields are read.
        fullest: Fields of the row that has most of those that are known, or all columns.
        split: Split that all rows belong to; empty if it is not known.
        images_alone: Whether none of the first 100,000 rows has text, so that images alone are asked stock prompts.
    """

    name: str
    format: str
    split: str = ""

    def __init__(self, name: str, kind: str, places: Places, reading: Reading) -> None:
        """Understand the fields of rows that are ready to be read.

        Args:
            name: Name of the data, as the user gave it.
            kind: Description of the format.
            places: Places to look for images.
            reading: Options for reading rows.

        Raises:
            DataError: if it has no field that the user names.
        """
        self.name = name
        self.places = places
        self.reading = reading
        if reading.ignored or reading.columns:
            names = {name: None for row in self.outlines() for name in row}
            validate_named(reading.ignored, reading.columns, names, name)
        first = islice(self.outlines(), _ASKED)
        self.images_alone = not any(asks(present(row, reading.ignored), reading.columns) for row in first)
        looked_at = (list(present(row, reading.ignored)) for row in islice(self.outlines(), _LOOKED_AT))
        roles = ((names, assign(names, reading.columns)) for names in looked_at)
        fullest, _ = max(roles, key=lambda each: ("image" in each[1], len(each[1])), default=([], {}))
        self.format = f"{kind} ({mapping(fullest, reading.columns)})"
        self.fullest = fullest

    def __len__(self) -> int:
        """Return the number of rows."""
        raise NotImplementedError

    def row(self, index: int) -> Any:
        """Return a row, an object if it is a good one.

        Raises:
            RowError: if it cannot be read.
        """
        raise NotImplementedError

    def outlines(self) -> Iterator[Fields]:
        """Yield what shows which fields there are: every row, a bad one empty; of a table one for all columns."""
        for index in range(len(self)):
            row: Any = None
            with suppress(RowError):
                row = self.row(index)
            yield row if isinstance(row, dict) else {}

    def fields(self) -> list[str]:
        """Return the fields by which rows can be grouped, in the order of their appearance."""
        groups = (name for row in self.outlines() for name, value in row.items() if group(value) is not None)
        return list(dict.fromkeys(groups))

    def columns(self) -> dict[str, str]:
        """Return the fields of the fullest row with their roles, empty for those that are not read."""
        roles = assign(self.fullest, self.reading.columns)
        read = {name: role for role, name in roles.items()}
        read |= dict.fromkeys(image_fields(self.fullest, self.reading.columns), "image")
        if "choices" not in roles and "question" in roles:
            read |= {name: f"choice {letter}" for letter, name in lettered(self.fullest).items()}
        return {name: read.get(name, "") for name in self.fullest}

    def number(self, index: int) -> int:
        """Return the number that the user knows a row by; its place, from 1, unless it is a line."""
        return index + 1

    def sample(self, index: int) -> Sample:
        """Read one row; its images stay unopened."""
        return self._read(index, [])

    def _read(self, index: int, values: list[Any]) -> Sample:
        """Read one row and append what it holds for images to `values`."""

        def open_image(value: Any) -> ImageSource:
            place = len(values)
            values.append(value)
            return self.places.find(
                value, f"image {place + 1} of row {self.number(index)}", lambda: self._value(index, place),
                split=split, row=identity,
            )  # fmt: skip

        row = self.row(index)
        about = row if isinstance(row, dict) else {}
        split, identity = self.split or str(about.get("split", "")), str(about.get("id", ""))
        return read_row(row, self.number(index), open_image, self.reading, images_alone=self.images_alone)

    def _value(self, index: int, place: int) -> Any:
        values: list[Any] = []
        self._read(index, values)
        return values[place]


def validate_readable(columns: Sequence[str], reading: Reading, name: str) -> None:
    """Check that some column of a table holds images or text.

    Raises:
        DataError: if none does, as far as is known.
    """
    read = [column for column in columns if column not in reading.ignored]
    if not (asks(read, reading.columns) or image_fields(read, reading.columns)):
        raise DataError(
            f"{name} has the columns {', '.join(read)}: none is known to hold images or text. Say what they "
            f"are, as in --columns image=NAME,question=NAME. Known names: {known_names()}"
        )
