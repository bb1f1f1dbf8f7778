"""The samples that calibration and evaluation read, whatever they came from. No torch."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal, cast

from dpn_cli.data.faults import RowError
from dpn_cli.data.findings import Fault, Scan
from dpn_cli.data.rows import KIND_FIELD, Reading
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.data.scan import Dataset, Progress, Source, scan
from dpn_cli.errors import DataError, UsageError, did_you_mean

__all__ = ["MAX_BAD", "Dataset", "Fault", "OnBadRow", "RowError", "Sample", "Scan", "Turn", "load_data"]

OnBadRow = Literal["fail", "skip"]
MAX_BAD = 0.05
DEMO_SAMPLES = 512
PROMPTS = ("Describe the image.",)
_TEXT_SUFFIXES = {".json", ".jsonl"}


def load_data(
    data: str,
    image_root: Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    *,
    on_bad_row: OnBadRow = "fail",
    max_bad: float = MAX_BAD,
    split: str = "calibration",
    limit: int | None = None,
    seed: int = 0,
    kind_field: str | None = None,
    ignored: Collection[str] = (),
    check: Callable[[Sample], None] = lambda sample: None,
    progress: Progress | None = None,
) -> Dataset:
    """Read samples and check every one of them, its images included.

    Args:
        data: `demo`; a LLaVA .json or .jsonl file, a CSV file, or a folder with one of them; a folder of images; a
            parquet or arrow file, or a folder of them; a folder from `save_to_disk`; or
            owner/name[:configuration[:split]] of the hub.
        image_root: where relative image paths start; by default the folder of the file that names them.
        prompts: the questions for images that come without one, in turn.
        on_bad_row: `fail`, or `skip` up to `max_bad`.
        max_bad: the share of the rows read that may be bad.
        split: of the demo data.
        limit: samples with an image to read, drawn over all of the data; None for all.
        seed: of the draw.
        kind_field: of a row, names the sample's group; None for `kind`, where there is one.
        ignored: fields of the rows that are left unread, as if they were not there.
        check: raises RowError for a sample that is of no use.
        progress: opens a progress bar (description, total) and yields its `advance`.

    Raises:
        DataError: if the data is none of these, or naming the bad rows.
        MissingExtraError: if it needs the package `datasets`.
        UsageError: if no row has the `kind_field`; names those that there are.
    """
    source = _source(data, image_root, Reading(prompts, kind_field or KIND_FIELD, ignored), split, limit)
    if kind_field is not None and kind_field not in (fields := source.fields()):
        known = f"they have {', '.join(fields)}" if fields else "they have none"
        hint = did_you_mean(kind_field, fields)
        raise UsageError(f"--by {kind_field}: no row of {data} has such a field to group by; {known}.{hint}")
    return scan(
        source, skip_bad=on_bad_row == "skip", max_bad=max_bad, limit=limit, seed=seed, check=check, progress=progress
    )


def _source(data: str, image_root: Path | None, reading: Reading, split: str, limit: int | None) -> Source:
    """Find out what the data is."""
    from dpn_cli.data.huggingface import CSV_SUFFIXES, TABLE_SUFFIXES, Table, is_hub_id

    if data == "demo":
        from dpn_cli.data.demo import DemoPictures
        from dpn_cli.demo.pictures import Split

        return DemoPictures(cast("Split", split), DEMO_SAMPLES if limit is None else limit)
    path = Path(data).expanduser()
    if path.is_dir():
        return _folder(path, image_root, reading)
    if path.is_file() and path.suffix.lower() in {*_TEXT_SUFFIXES, *CSV_SUFFIXES, *TABLE_SUFFIXES}:
        return _file(path, image_root or path.parent, reading)
    if not path.exists() and is_hub_id(data):
        return Table(data, image_root or Path(), reading)
    what = f"is a {path.suffix or 'file without a suffix'}" if path.exists() else "does not exist"
    raise DataError(
        f"--data {data} {what}: expected a LLaVA .json or .jsonl file, a folder of images, a parquet, arrow or CSV "
        "file, a folder from save_to_disk, owner/name on the hub, or demo"
    )


def _file(path: Path, image_root: Path, reading: Reading) -> Source:
    from dpn_cli.data.huggingface import Table
    from dpn_cli.data.llava import LlavaFile

    if path.suffix.lower() in _TEXT_SUFFIXES:
        return LlavaFile(path, image_root, reading)
    return Table(str(path), image_root, reading)


def _folder(folder: Path, image_root: Path | None, reading: Reading) -> Source:
    """Find out what a folder holds: rows that name images go before the images themselves."""
    from dpn_cli.data.folder import ImageFolder
    from dpn_cli.data.huggingface import CSV_SUFFIXES, Table, is_saved_dataset, table_files
    from dpn_cli.data.llava import holds_rows

    root = image_root or folder
    if is_saved_dataset(folder):
        return Table(str(folder), root, reading)
    files = sorted(folder.iterdir())
    texts = [path for path in files if path.suffix.lower() in _TEXT_SUFFIXES and holds_rows(path)]
    if not (tables := table_files(folder)):
        texts += [path for path in files if path.suffix.lower() in CSV_SUFFIXES]
    if len(texts) > 1:
        names = ", ".join(path.name for path in texts)
        raise DataError(f"{folder} holds several files of rows ({names}): give one of them as --data")
    if texts:
        return _file(texts[0], root, reading)
    if tables:
        return Table(str(folder), root, reading)
    return ImageFolder(folder, reading.prompts)
