"""Tables that the `datasets` package holds: of the hub, saved to disk, or parquet and arrow files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpn_cli.data.fields import Fields
from dpn_cli.data.formats import Request
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading
from dpn_cli.data.rowsource import RowSource, validate_readable
from dpn_cli.errors import DataError, MissingExtraError

TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
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


class Table(RowSource):
    """The rows of a data set, images undecoded."""

    def __init__(self, name: str, places: Places, reading: Reading) -> None:
        """Open a data set.

        Args:
            name: A folder from `save_to_disk`, a folder or file of parquet or arrow, or a data set of the hub as
                owner/name[:configuration[:split]]; without a split, `train` or else the first one.
            places: Where images outside of the table are looked for.
            reading: Options for reading rows.

        Raises:
            DataError: if it cannot be opened or has no field that is known.
            MissingExtraError: if the package `datasets` is not installed.
        """
        kind, dataset = _open(name)
        if len(dataset) == 0:
            raise DataError(f"{name} holds no rows")
        self.rows = dataset.with_format("arrow")  # plain values: an image stays {bytes, path}
        super().__init__(name, kind, places, reading)
        validate_readable(dataset.column_names, reading, name)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def outlines(self) -> Iterator[Fields]:
        """Yield the columns, with a text for those that hold groups."""
        yield {name: "" if _is_plain(kind) else b"" for name, kind in self.rows.features.items()}

    def row(self, index: int) -> Any:
        """Return a row."""
        return self.rows[index].to_pylist()[0]


def _is_plain(kind: Any) -> bool:
    """Tell whether a column of this kind holds texts, numbers or truth values."""
    from datasets import ClassLabel, Value

    return isinstance(kind, ClassLabel) or (isinstance(kind, Value) and "binary" not in kind.dtype)


def open_saved(request: Request) -> Table | None:
    """Open a folder from `save_to_disk`."""
    return Table(str(request.path), request.places, request.reading) if is_saved_dataset(request.path) else None


def open_table(request: Request) -> Table | None:
    """Open a parquet or arrow file, or a folder with such files."""
    path = request.path
    if path.is_dir():
        return Table(str(path), request.places, request.reading) if table_files(path) else None
    is_table = path.is_file() and path.suffix.lower() in TABLE_SUFFIXES
    return Table(request.data, request.places, request.reading) if is_table else None


def open_hub(request: Request) -> Table | None:
    """Open a data set of the hub, where nothing on disk has this name."""
    if request.path.exists() or not is_hub_id(request.data):
        return None
    return Table(request.data, request.places, request.reading)


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
            kind = TABLE_SUFFIXES[files[0].suffix.lower()]
            loaded = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")
            return f"{kind} of {len(files)} files", loaded
        repository, config, split = [*name.split(":"), "", ""][:3]
        loaded = datasets.load_dataset(repository, config or None, split=split or None)
        return _one_split(loaded, f"data set {name} of the hub")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = "cannot be opened" if path.exists() else "is not a file or folder here, and cannot be read from the hub"
        raise DataError(f"--data {name} {what}: {type(error).__name__}: {error}") from None


def _one_split(loaded: Any, kind: str) -> tuple[str, Any]:
    """Return `train`, or else the first split, of a data set that has several."""
    if not isinstance(loaded, dict):
        return kind, loaded
    split = "train" if "train" in loaded else next(iter(loaded))
    return f"{kind}, split {split}", loaded[split]
