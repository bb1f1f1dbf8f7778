"""Read data in any format, and check it first. No torch."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal

from dpn_cli.data.formats import Request, open_source
from dpn_cli.data.rows import KIND_FIELD, Reading
from dpn_cli.data.samples import Sample
from dpn_cli.data.scan import Dataset, Progress, scan
from dpn_cli.errors import UsageError, did_you_mean

OnBadRow = Literal["fail", "skip"]
MAX_BAD = 0.05
PROMPTS = ("Describe the image.",)


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
        data: in one of `FORMATS`; a folder may also hold the file or files.
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
    source = open_source(Request(data, image_root, Reading(prompts, kind_field or KIND_FIELD, ignored), split, limit))
    if kind_field is not None and kind_field not in (fields := source.fields()):
        known = f"they have {', '.join(fields)}" if fields else "they have none"
        hint = did_you_mean(kind_field, fields)
        raise UsageError(f"--by {kind_field}: no row of {data} has such a field to group by; {known}.{hint}")
    return scan(
        source, skip_bad=on_bad_row == "skip", max_bad=max_bad, limit=limit, seed=seed, check=check, progress=progress
    )
