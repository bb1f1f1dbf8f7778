"""The samples that calibration and evaluation read, whatever they came from. No torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from dpn_cli.data.faults import RowError
from dpn_cli.data.findings import Fault, Scan
from dpn_cli.data.options import DataOptions
from dpn_cli.data.rows import KIND_FIELD, Reading
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.data.scan import Dataset, Source, scan
from dpn_cli.errors import DataError, UsageError, did_you_mean
from dpn_cli.reporter import SILENT, Reporter

__all__ = ["DataOptions", "Dataset", "Fault", "RowError", "Sample", "Scan", "Turn", "load_data"]

DEMO_SAMPLES = 512
PROMPTS = ("Describe the image.",)
_TEXT_SUFFIXES = {".json", ".jsonl"}


def load_data(
    data: DataOptions,
    prompts: Sequence[str] = PROMPTS,
    *,
    split: str = "calibration",
    limit: int | None = None,
    seed: int = 0,
    check: Callable[[Sample], None] = lambda sample: None,
    reporter: Reporter = SILENT,
) -> Dataset:
    """Read samples, check every one of them, its images included, and report what was found.

    Args:
        data: which data, and how to read them.
        prompts: the questions for images that come without one, in turn.
        split: of the demo data.
        limit: samples with an image to read, drawn over all of the data; None for all.
        seed: of the draw.
        check: raises RowError for a sample that is of no use.
        reporter: told the progress and the findings.

    Raises:
        DataError: if the data is none of these, or naming the bad rows.
        MissingExtraError: if it needs the package `datasets`.
        UsageError: if no row has the `kind_field`; names those that there are.
    """
    source = _source(data, Reading(prompts, data.kind_field or KIND_FIELD, data.ignored), split, limit)
    if data.kind_field is not None and data.kind_field not in (fields := source.fields()):
        known = f"they have {', '.join(fields)}" if fields else "they have none"
        hint = did_you_mean(data.kind_field, fields)
        raise UsageError(f"--by {data.kind_field}: no row of {data.name} has such a field to group by; {known}.{hint}")
    dataset = scan(
        source, skip_bad=data.on_bad_row == "skip", max_bad=data.max_bad, limit=limit, seed=seed, check=check,
        reporter=reporter,
    )  # fmt: skip
    for line in dataset.scan.lines():
        reporter.note(line)
    return dataset


def _source(data: DataOptions, reading: Reading, split: str, limit: int | None) -> Source:
    """Find out what the data is."""
    from dpn_cli.data.huggingface import TABLE_SUFFIXES, Table, is_hub_id
    from dpn_cli.data.llava import LlavaFile

    name, image_root = data.name, data.image_root
    if name == "demo":
        from dpn_cli.data.demo import DemoPictures
        from dpn_cli.demo.pictures import Split

        return DemoPictures(cast("Split", split), DEMO_SAMPLES if limit is None else limit)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, image_root, reading)
    if path.is_file() and path.suffix.lower() in _TEXT_SUFFIXES:
        return LlavaFile(path, image_root or path.parent, reading)
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        return Table(name, image_root or path.parent, reading)
    if not path.exists() and is_hub_id(name):
        return Table(name, image_root or Path(), reading)
    what = f"is a {path.suffix or 'file without a suffix'}" if path.exists() else "does not exist"
    raise DataError(
        f"--data {name} {what}: expected a LLaVA .json or .jsonl file, a folder of images, a parquet or arrow file, "
        "a folder from save_to_disk, owner/name on the hub, or demo"
    )


def _folder(folder: Path, image_root: Path | None, reading: Reading) -> Source:
    """Find out what a folder holds: rows that name images go before the images themselves."""
    from dpn_cli.data.folder import ImageFolder
    from dpn_cli.data.huggingface import Table, is_saved_dataset, table_files
    from dpn_cli.data.llava import LlavaFile, holds_rows

    root = image_root or folder
    if is_saved_dataset(folder):
        return Table(str(folder), root, reading)
    texts = sorted(path for path in folder.iterdir() if path.suffix.lower() in _TEXT_SUFFIXES and holds_rows(path))
    if len(texts) > 1:
        names = ", ".join(path.name for path in texts)
        raise DataError(f"{folder} holds several files of rows ({names}): give one of them as --data")
    if texts:
        return LlavaFile(texts[0], root, reading)
    if table_files(folder):
        return Table(str(folder), root, reading)
    return ImageFolder(folder, reading.prompts)
