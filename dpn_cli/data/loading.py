"""Read data in any format, and check it first. No torch."""

from collections.abc import Callable, Sequence

from dpn_cli.data.formats import Request, open_source
from dpn_cli.data.huggingface import STREAMED
from dpn_cli.data.options import DataOptions
from dpn_cli.data.rows import KIND_FIELD, Reading
from dpn_cli.data.rowsource import RowSource
from dpn_cli.data.samples import Sample
from dpn_cli.data.scan import Dataset, scan
from dpn_cli.errors import UsageError, did_you_mean
from dpn_cli.reporter import SILENT, Reporter

PROMPTS = ("Describe the image.",)


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
        data: Options that name the data and say how to read them.
        prompts: the questions for images that come without one, in turn.
        split: Split of the demo data to read.
        limit: number of samples with an image to read, drawn over all of the data; None for all.
        seed: random seed for sampling.
        check: Function that raises RowError for a sample that cannot be used.
        reporter: Reporter of the progress and the findings.

    Raises:
        DataError: if the data is in none of `FORMATS`, or naming the bad rows.
        MissingExtraError: if it needs the package `datasets`.
        UsageError: if no row has the `kind_field`, naming those that there are; or if fields are named of data that
            have none.
    """
    reading = Reading(prompts, data.kind_field or KIND_FIELD, data.ignored, data.columns)
    if data.stream and limit is None:
        raise UsageError("--stream reads no more than you ask for: say how much with --samples")
    request = Request(data.name, data.image_root, reading, split, limit, seed, data.stream, data.allow_urls)
    with reporter.waiting("opening the data"):
        source = open_source(request)
    if data.stream and not source.format.startswith(STREAMED):
        raise UsageError(
            f"--stream: {data.name} is a {source.format}, which is not read by `datasets`: leave --stream out"
        )
    if (data.columns or data.ignored) and not isinstance(source, RowSource):
        option = "--columns" if data.columns else "--ignore-fields"
        raise UsageError(f"{option}: {data.name} is a {source.format}, which has no columns")
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
