"""CSV and TSV files: a header with the names of the columns, then one row per record."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpn_cli.data.faults import RowError, unreadable
from dpn_cli.data.fields import Fields
from dpn_cli.data.formats import Request, only_file
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading
from dpn_cli.data.rowsource import RowSource, validate_readable
from dpn_cli.errors import DataError
from dpn_cli.limits import MAX_IMAGE_BYTES

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHER_DELIMITERS = ";\t|"  # of a .csv, as spreadsheets write it where the comma is the decimal mark
_LONGEST_INDEX = 64  # characters
_EMPTY = ("", "nan")  # the last as pandas writes it, where it writes texts


class CsvFile(RowSource):
    """The rows of a CSV or TSV file; every cell is the text that it is, or nothing."""

    def __init__(self, path: Path, places: Places, reading: Reading) -> None:
        """Read the file.

        Raises:
            DataError: if it is not text, has a broken header or record, no rows, or no column that is known.
        """
        csv.field_size_limit(MAX_IMAGE_BYTES)  # a cell may hold an image in base64
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                lines = list(file)
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(path, error) from None
        header, *self.records = _records(path, lines) or [[]]
        if not self.records:
            raise DataError(f"{path} holds no rows")
        self.header = header = [name.strip() for name in header]
        if twice := next((name for name, count in Counter(header).items() if count > 1), None):
            raise DataError(f"{path}: the column {twice!r} appears twice in the header {', '.join(header)}")
        self._images = self._encoded()
        super().__init__(str(path), path.suffix[1:].upper(), places, reading)
        validate_readable(header, reading, self.name)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.records)

    def outlines(self) -> Iterator[Fields]:
        """Yield the columns."""
        yield dict.fromkeys(self.header, "")

    def row(self, index: int) -> dict[str, Any]:
        """Return a row by the names of its columns."""
        cells = self.records[index]
        if len(cells) < len(self.header):
            missing = ", ".join(f"`{name}`" for name in self.header[len(cells) :])
            raise RowError("a row that lacks a column", f"{len(cells)} cells, so nothing for {missing}")
        if len(cells) > len(self.header):
            raise RowError(
                "a row with too many cells",
                f"{len(cells)} cells for the {len(self.header)} columns {', '.join(self.header)}; quote a cell that "
                "holds a delimiter",
            )
        row = {name: None if cell in _EMPTY else cell for name, cell in zip(self.header, cells, strict=True)}
        image = row.get("image")
        return row | {"image": self._images[image]} if image in self._images else row

    def _encoded(self) -> dict[str | None, str]:
        """Return the cells that hold an image by the index of their rows: other rows name that instead.

        Source: VLMEvalKit's files, https://github.com/open-compass/VLMEvalKit/blob/main/vlmeval/dataset/image_base.py.
        """
        if not {"index", "image"} <= set(self.header):
            return {}
        index, image = map(self.header.index, ("index", "image"))
        pairs = ((cells[index], cells[image]) for cells in self.records if len(cells) == len(self.header))
        return {row: cell for row, cell in pairs if len(row) <= _LONGEST_INDEX < len(cell)}


def _records(path: Path, lines: list[str]) -> list[list[str]]:
    """Return the records that are not blank, the header first.

    Raises:
        DataError: if a quote is left open, or closed before the cell ends; names row and column.
    """
    delimiter = _delimiter(path, lines)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    records: list[list[str]] = []
    begins = 0  # lines before the record that is read
    try:
        for cells in reader:
            records += [cells] if cells else []
            begins = reader.line_num
    except csv.Error as error:
        cells = next(csv.reader(lines[begins : reader.line_num], delimiter=delimiter))
        place = next((i for i, cell in enumerate(cells) if "\n" in cell), len(cells) - 1)
        column = records[0][place] if records and place < len(records[0]) else str(place + 1)
        row = f"row {len(records)}" if records else "the header"
        raise DataError(
            f"{path}, line {begins + 1}: {row}, column `{column}`: a quote is left open, or closed before the cell "
            f'ends ({error}); write a quote inside a quoted cell twice, as ""'
        ) from None
    return records


def _delimiter(path: Path, lines: list[str]) -> str:
    """Return what stands between the cells: another than the file's name says where only that one makes columns."""
    usual = _DELIMITERS[path.suffix.lower()]
    header = next((line for line in lines if line.strip()), "")
    return next(
        (each for each in (usual, *_OTHER_DELIMITERS) if len(next(csv.reader([header], delimiter=each))) > 1), usual
    )


def open_csv(request: Request) -> CsvFile | None:
    """Open a CSV or TSV file, or the one of a folder.

    Raises:
        DataError: if there are several in the folder.
    """
    path = only_file(request, _DELIMITERS, Path.is_file)
    return CsvFile(path, request.places, request.reading) if path else None
