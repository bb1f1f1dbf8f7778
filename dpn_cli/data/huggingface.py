"""Tables that the `datasets` package holds: of the hub, saved to disk, or parquet and arrow files."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpn_cli.data.fields import Fields
from dpn_cli.data.formats import Request, files_below
from dpn_cli.data.rowsource import RowSource, validate_readable
from dpn_cli.data.webdataset import ARCHIVE, KEY, row_of
from dpn_cli.errors import DataError, MissingExtraError
from dpn_cli.notation import counted

STREAMED = "streamed"  # begins the descriptions of such tables
SPARE = 2  # rows of a stream that are kept for each that is wanted
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
_SPLIT = re.compile(r"(?:.*?[-_.])?(train(?:ing)?|val(?:id(?:ation)?)?|dev|test(?:ing)?|eval(?:uation)?)(?:[-_.\d].*)?")
_SHARD = re.compile(r"(.+?)-\d+-of-\d+")  # how the names of the hub's files begin
_CACHED = "cache-"  # begins the names of what `datasets` has computed from a table, beside it
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]*){0,2}")


class Table(RowSource):
    """The rows of a data set, images undecoded."""

    def __init__(self, request: Request, load: Callable[[Any, Request], tuple[str, Any]]) -> None:
        """Open a data set.

        Args:
            request: the data.
            load: Function that returns in words what was loaded, and the data set or the stream of its rows, by the
                package `datasets`.

        Raises:
            DataError: if it cannot be opened or has no field that is known.
            MissingExtraError: if the package `datasets` is not installed.
        """
        name = request.data
        kind, dataset = _open(request, load)
        if len(dataset) == 0:
            raise DataError(f"{name} holds no rows")
        self.rows = dataset.with_format("arrow")  # plain values: an image stays {bytes, path}
        self.is_webdataset = KEY in dataset.column_names
        super().__init__(name, kind, request.places, request.reading)
        validate_readable([name for row in self.outlines() for name in row], request.reading, name)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def outlines(self) -> Iterator[Fields]:
        """Yield the columns, with a text for those that hold groups."""
        columns = {name: _outline(kind) for name, kind in self.rows.features.items()}
        yield row_of(columns) if self.is_webdataset else columns

    def row(self, index: int) -> Any:
        """Return a row, the numbers of classes as their names."""
        row = _in_words(self.rows[index].to_pylist()[0], dict(self.rows.features))
        return row_of(row) if self.is_webdataset else row


def _outline(kind: Any) -> Any:
    """Return what stands for the values of a column: a text for texts, numbers and truth values, which are groups."""
    from datasets import ClassLabel, Value

    if isinstance(kind, dict):
        return {name: _outline(inner) for name, inner in kind.items()}
    return "" if isinstance(kind, ClassLabel) or (isinstance(kind, Value) and "binary" not in kind.dtype) else b""


def _in_words(value: Any, kind: Any) -> Any:
    """Return a value with the names of classes, at any depth, and short floats as they were written."""
    from datasets import ClassLabel, Value

    if isinstance(kind, ClassLabel):  # a missing one is None or, as `datasets` writes it, -1
        return None if value is None or value < 0 else kind.names[value]
    if isinstance(kind, Value) and kind.dtype in ("float16", "float32") and value is not None:
        return float(str(np.dtype(kind.dtype).type(value)))
    if isinstance(kind, dict) and isinstance(value, dict):
        return {name: _in_words(inner, kind.get(name)) for name, inner in value.items()}
    if isinstance(value, list):
        inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)
        return [_in_words(each, inner) for each in value]
    return value


def open_saved(request: Request) -> Table | None:
    """Open a folder from `save_to_disk`."""
    folder = request.path
    is_saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    return Table(request, _load_saved) if is_saved else None


def open_table(request: Request) -> Table | None:
    """Open a parquet or arrow file, or a folder with such files."""
    files = _table_files(request.path)
    return Table(request, partial(_load_files, files)) if files else None


def open_hub(request: Request) -> Table | None:
    """Open a data set of the hub, where nothing on disk has this name: owner/name[:configuration[:split]]."""
    return Table(request, _load_hub) if _HUB_ID.fullmatch(request.data) and not request.path.exists() else None


def _open(request: Request, load: Callable[[Any, Request], tuple[str, Any]]) -> tuple[str, Any]:
    """Return in words what was opened, and the data set; of a stream, what was drawn from it."""
    name, path = request.data, request.path
    try:
        import datasets
    except ImportError:
        what = "a table" if path.exists() else "there is no such file or folder here, and a data set of the hub"
        raise MissingExtraError(f"--data {name}: {what}", "datasets", "data") from None
    try:
        with _quietly(datasets):
            kind, loaded = load(datasets, request)
            if isinstance(loaded, datasets.IterableDataset):
                return f"{STREAMED} {kind}", _drawn(datasets, loaded, request)
            return kind, loaded
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = "cannot be opened" if path.exists() else "is not a file or folder here, and cannot be read from the hub"
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split())
        raise DataError(f"--data {name} {what}: {type(cause or error).__name__}: {reason}") from None


@contextmanager
def _quietly(datasets: Any) -> Iterator[None]:
    """Keep what `datasets` logs of an error that is raised as well."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _load_saved(datasets: Any, request: Request) -> tuple[str, Any]:
    return _one_split(datasets.load_from_disk(str(request.path)), "saved data set")


def _load_files(files: Sequence[Path], datasets: Any, request: Request) -> tuple[str, Any]:
    """Load those of one split."""
    kind = TABLE_SUFFIXES[files[0].suffix.lower()]
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split(file, request.path), []).append(str(file))
    if "" in splits and len(splits) > 1:
        named, other = ", ".join(sorted(splits.keys() - {""})), Path(splits[""][0]).name
        raise DataError(
            f"{request.data} holds files of {named} and others, such as {other}: give a file, or a folder of one kind"
        )
    split = _main_split(splits)
    others = ", ".join(sorted(splits.keys() - {split}))
    chosen = [file for file in splits[split] if kind != "parquet" or _num_rows(file)]  # `datasets` takes no others
    if not chosen:
        raise DataError(f"{request.data} holds no rows")
    loaded = datasets.load_dataset(kind, data_files=chosen, split="train", streaming=request.stream)
    which = f", split {split}" if others or _SPLIT.fullmatch(split) else ""
    return f"{kind} of {counted(len(chosen), 'file')}{which}{others and f', not {others}'}", loaded


def _load_hub(datasets: Any, request: Request) -> tuple[str, Any]:
    repository, config, split = [*request.data.split(":"), "", ""][:3]
    loaded = datasets.load_dataset(repository, config or None, split=split or None, streaming=request.stream)
    return _one_split(loaded, f"data set {request.data} of the hub")


def _table_files(path: Path) -> list[Path]:
    """Return a file itself, or the parquet files, or else the arrow files, in a folder and below."""
    if path.is_file():
        return [path] if path.suffix.lower() in TABLE_SUFFIXES else []
    below = files_below(path)
    beside = {file.with_suffix("") for file in below if file.suffix.lower() == ARCHIVE}  # as img2dataset writes both
    for suffix in TABLE_SUFFIXES:
        files = [file for file in below if file.suffix.lower() == suffix and not file.name.startswith(_CACHED)]
        if files and not {file.with_suffix("") for file in files} <= beside:
            return files
    return []


def _num_rows(file: str) -> int:
    """Return the number of rows of a parquet file, from its footer."""
    from pyarrow import parquet

    return int(parquet.read_metadata(file).num_rows)


def _split(file: Path, root: Path) -> str:
    """Return the split that the name of a table's file tells, or that of a folder below the root; "" if none does."""
    shard, named = _SHARD.match(file.stem), _SPLIT.fullmatch(file.stem)
    if named:
        return shard[1] if shard else named[1]
    folders = [folder.name for folder in file.parents if folder != root and folder.is_relative_to(root)]
    for found in filter(None, map(_SPLIT.fullmatch, folders)):
        return found[1]
    return shard[1] if shard else ""


def _drawn(datasets: Any, stream: Any, request: Request) -> Any:
    """Return the first rows of a shuffled stream: twice as many as are wanted, to replace bad and text-only ones."""
    import pyarrow

    count = SPARE * (request.limit or 1)
    shuffled = stream.shuffle(seed=request.seed, buffer_size=count).take(count)
    rows = list(shuffled.with_format("arrow").iter(batch_size=1))  # tables, whose columns may differ in order
    if not rows:
        raise ValueError("the stream holds no rows")
    return datasets.Dataset(pyarrow.concat_tables(rows, promote_options="default"), info=stream.info)


def _one_split(loaded: Any, kind: str) -> tuple[str, Any]:
    """Return `train`, or else the first split, of a data set that has several."""
    if not isinstance(loaded, dict):
        return kind, loaded
    split = _main_split(loaded)
    return f"{kind}, split {split}", loaded[split]


def _main_split(splits: Mapping[str, Any]) -> str:
    """Return the name of the split to read: `train`, or another one for training, or else the first."""
    named = [name for name in splits if (match := _SPLIT.fullmatch(name)) and match[1].startswith("train")]
    return "train" if "train" in splits else next(iter(named or splits))
