"""Tables that the `datasets` package holds: of the hub, saved to disk, or parquet, arrow and CSV files."""

import csv
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dpn_cli.data.fields import asks, is_readable, known_names, mapping, validate_ignored
from dpn_cli.data.formats import Request, only_file
from dpn_cli.data.images import image_path
from dpn_cli.data.rows import Reading, read_row
from dpn_cli.data.samples import ImageSource, Sample, StoredImage
from dpn_cli.errors import DataError, MissingExtraError

TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
CSV_SUFFIXES = {".csv": ",", ".tsv": "\t"}  # with what stands between the cells
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]*){0,2}")


def is_hub_id(data: str) -> bool:
    """Tell whether a text can name a data set of the hub: owner/name[:configuration[:split]]."""
    return _HUB_ID.fullmatch(data) is not None


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def table_files(folder: Path) -> list[Path]:
    """Return the parquet files, or else the arrow files, in a folder and below."""
    for suffix in TABLE_SUFFIXES:
        if files := sorted(folder.rglob(f"*{suffix}")):
            return files
    return []


class Table:
    """The rows of a data set, images undecoded."""

    def __init__(self, name: str, image_root: Path, reading: Reading) -> None:
        """Open a data set.

        Args:
            name: a folder from `save_to_disk`, a folder or file of parquet or arrow, a CSV file, or a data set of the
                hub as owner/name[:configuration[:split]]; without a split, `train` or else the first one.
            image_root: the folder that paths of images outside the table start in.
            reading: Options for reading rows.

        Raises:
            DataError: if it cannot be opened or has no field that is known.
            MissingExtraError: if the package `datasets` is not installed.
        """
        kind, dataset = _open(name)
        if len(dataset) == 0:
            raise DataError(f"{name} holds no rows")
        self.name = name
        self.image_root = image_root
        self.reading = reading
        self.rows = dataset.with_format("arrow")  # plain values: an image stays {bytes, path}
        validate_ignored(reading.ignored, dataset.column_names, name)
        columns = [column for column in dataset.column_names if column not in reading.ignored]
        if not is_readable(columns):
            raise DataError(
                f"{name} has the columns {', '.join(columns)}: none is known to hold images or text. "
                f"Known are {known_names()}"
            )
        self.images_alone = not asks(columns)
        self.format = f"{kind} ({mapping(columns)})"

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def number(self, index: int) -> int:
        """Return the row's number, from 1."""
        return index + 1

    def fields(self) -> list[str]:
        """Return the columns of plain values, which hold groups."""
        return [name for name, kind in self.rows.features.items() if _is_plain(kind)]

    def sample(self, index: int) -> Sample:
        """Read one row."""
        return self._read(index, [])

    def _read(self, index: int, values: list[Any]) -> Sample:
        """Read one row and append what it holds for images to `values`."""

        def open_image(value: Any) -> ImageSource:
            values.append(value)
            if _bytes(value) is None:
                return image_path(self.image_root, value)
            place = len(values) - 1
            return StoredImage(f"image {place + 1} of row {self.number(index)}", lambda: self._image(index, place))

        row = self.rows[index].to_pylist()[0]
        return read_row(row, self.number(index), open_image, self.reading, images_alone=self.images_alone)

    def _image(self, index: int, place: int) -> bytes:
        """Fetch the encoded bytes of one image; samples do not hold on to them."""
        values: list[Any] = []
        self._read(index, values)
        data = _bytes(values[place])
        assert data is not None
        return data


def _is_plain(kind: Any) -> bool:
    """Tell whether a column of this kind holds texts, numbers or truth values."""
    from datasets import ClassLabel, Value

    return isinstance(kind, ClassLabel) or (isinstance(kind, Value) and "binary" not in kind.dtype)


def _bytes(value: Any) -> bytes | None:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) else None


def open_saved(request: Request) -> Table | None:
    """Open a folder from `save_to_disk`."""
    return Table(str(request.path), request.root, request.reading) if is_saved_dataset(request.path) else None


def open_table(request: Request) -> Table | None:
    """Open a parquet or arrow file, or a folder with such files."""
    path = request.path
    if path.is_dir():
        return Table(str(path), request.root, request.reading) if table_files(path) else None
    is_table = path.is_file() and path.suffix.lower() in TABLE_SUFFIXES
    return Table(request.data, request.root, request.reading) if is_table else None


def open_csv(request: Request) -> Table | None:
    """Open a CSV file, or the one of a folder.

    Raises:
        DataError: if there are several in the folder.
    """
    path = only_file(request, CSV_SUFFIXES, Path.is_file)
    return Table(str(path), request.root, request.reading) if path else None


def open_hub(request: Request) -> Table | None:
    """Open a data set of the hub, where nothing on disk has this name."""
    if request.path.exists() or not is_hub_id(request.data):
        return None
    return Table(request.data, request.image_root or Path(), request.reading)


def _open(name: str) -> tuple[str, Any]:
    """Return in words what was opened, and the data set."""
    path = Path(name).expanduser()
    try:
        import datasets
    except ImportError:
        what = "a table" if path.exists() else "there is no such file or folder here, and a data set of the hub"
        raise MissingExtraError(f"--data {name}: {what}", "datasets", "data") from None
    try:
        if is_saved_dataset(path):
            return _one_split(datasets.load_from_disk(str(path)), "saved data set")
        if path.exists():
            files = [path] if path.is_file() else table_files(path)
            if (suffix := files[0].suffix.lower()) in CSV_SUFFIXES:
                return "CSV", datasets.Dataset.from_list(_csv_rows(path, CSV_SUFFIXES[suffix]))
            kind = TABLE_SUFFIXES[suffix]
            loaded = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")
            return f"{kind} of {len(files)} files", loaded
        repository, config, split = [*name.split(":"), "", ""][:3]
        loaded = datasets.load_dataset(repository, config or None, split=split or None)
        return _one_split(loaded, f"data set {name} of the hub")
    except (OSError, ValueError, RuntimeError, csv.Error, datasets.exceptions.DatasetsError) as error:
        what = "cannot be opened" if path.exists() else "is not a file or folder here, and cannot be read from the hub"
        raise DataError(f"--data {name} {what}: {type(error).__name__}: {error}") from None


def _csv_rows(path: Path, delimiter: str) -> list[dict[str, str | None]]:
    """Return the rows below the header, cells as the texts that they are, None for empty ones.

    Raises:
        ValueError: if a name comes twice, or a row has more cells than there are names.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"a name comes twice in the header {', '.join(names)}")
        rows = []
        for cells in filter(None, reader):
            if len(cells) > len(names):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells, the header has {len(names)}")
            rows.append({name: cell or None for name, cell in zip_longest(names, cells)})
    return rows


def _one_split(loaded: Any, kind: str) -> tuple[str, Any]:
    """Return `train`, or else the first split, of a data set that has several."""
    if not isinstance(loaded, dict):
        return kind, loaded
    split = "train" if "train" in loaded else next(iter(loaded))
    return f"{kind}, split {split}", loaded[split]
