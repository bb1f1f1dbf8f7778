"""The pre-flight scan: draw rows, read and check each of them, count what there is and what is wrong."""

import hashlib
import os
import random
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from PIL import Image

from dpn_cli.data.faults import MISSING, UNREAD, RowError
from dpn_cli.data.fields import known_names
from dpn_cli.data.findings import Fault, Scan
from dpn_cli.data.images import check_image, printable, read_file
from dpn_cli.data.samples import ImageSource, Sample, StoredImage
from dpn_cli.errors import DataError
from dpn_cli.reporter import SILENT, Reporter

_CHUNK = 4096  # rows that threads have before them
_MANY = 10_000  # bad rows
THREADS = min(8, os.cpu_count() or 1)


class Source(Protocol):
    """Rows that can be read one at a time, in any order."""

    @property
    def name(self) -> str:
        """What the user called it."""

    @property
    def format(self) -> str:
        """What it was taken for, and how its fields were understood."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def columns(self) -> dict[str, str]:
        """Return the roles in which the columns are read, empty for those that are not; nothing without columns."""

    def number(self, index: int) -> int:
        """Return the number that the user knows a row by."""

    def fields(self) -> Sequence[str]:
        """Return the names of the fields by which rows can be grouped."""

    def sample(self, index: int) -> Sample:
        """Read one row; its images stay unopened.

        Raises:
            RowError: if it makes no sample.
        """


@dataclass(frozen=True)
class Dataset:
    """Samples that were checked, in the order of their rows.

    Attributes:
        samples: the good samples.
        contents: digests of the samples' texts and image bytes, whatever their names and rows.
        scan: Findings of the scan.
        digest: a digest of all samples and their names: the same data gives the same digest anywhere.
        columns: Roles of the columns, as `Source.columns`.
    """

    samples: Sequence[Sample]
    contents: Sequence[str]
    scan: Scan
    digest: str
    columns: dict[str, str]


def scan(
    source: Source,
    *,
    skip_bad: bool,
    max_bad: float,
    limit: int | None,
    seed: int,
    check: Callable[[Sample], None] = lambda sample: None,
    reporter: Reporter = SILENT,
) -> Dataset:
    """Read rows until there are enough good ones with an image.

    Args:
        source: the rows to read.
        skip_bad: leave bad rows out rather than fail.
        max_bad: the share of bad rows that may be left out.
        limit: number of samples with an image to read, drawn over all of the data; None for all rows. Text-only samples
            that are met on the way come in addition.
        seed: random seed for sampling.
        check: Function that raises RowError for samples that cannot be used, called for one at a time.
        reporter: Reporter of the progress.

    Raises:
        DataError: if there is no usable row, or naming the bad ones.
    """
    good: list[_Good] = []
    faults: list[Fault] = []
    order = _draw(len(source), limit, seed)
    wanted = len(source) if limit is None else limit
    drawn = 0
    pool = ThreadPoolExecutor(THREADS)
    try:
        while rows := order[drawn : drawn + wanted]:
            drawn += len(rows)
            with reporter.progress("reading the data", len(rows)) as advance:
                for start in range(0, len(rows), _CHUNK):
                    for outcome in pool.map(partial(_read, source), rows[start : start + _CHUNK]):
                        _sort_in(outcome, good, faults, check)
                        advance(1)
                    if len(faults) > max(_MANY, skip_bad * max_bad * drawn):
                        break  # enough to refuse them all
            found = Scan.of(source.format, len(source), [each.sample for each in good], faults)
            if faults and not (skip_bad and found.bad_fraction <= max_bad):
                raise DataError(_complaint(source, found, skip_bad, max_bad))
            wanted = 0 if limit is None else limit - found.with_image
            reporter = SILENT  # the few rows that replace bad and text-only ones are read in silence
    finally:
        pool.shutdown(cancel_futures=True)
    good.sort(key=lambda each: each.index)
    digest = hashlib.sha256("\n".join(each.digest for each in good).encode()).hexdigest()
    samples, contents = [each.sample for each in good], [each.content for each in good]
    return Dataset(samples, contents, found, digest, source.columns())


@dataclass(frozen=True)
class _Good:
    """A sample that was read, where it stands and what it holds, with its name and without."""

    index: int
    sample: Sample
    digest: str
    content: str


def _draw(rows: int, limit: int | None, seed: int) -> Sequence[int]:
    """Return the row indices in the order to read them in."""
    if limit is None or limit >= rows:
        return range(rows)
    order = array("q", range(rows))
    random.Random(seed).shuffle(order)
    return order


def _read(source: Source, index: int) -> _Good | Fault:
    """Read one row and check its images."""
    try:
        sample = source.sample(index)
        images = b"".join(validate_images(sample))
    except RowError as fault:
        return Fault(source.number(index), fault.reason, fault.detail)
    texts = (sample.system, sample.turns)
    digest, content = (
        hashlib.sha256(repr(each).encode() + images).hexdigest() for each in ((sample.id, *texts), texts)
    )
    return _Good(index, replace(sample, row=source.number(index)), digest, content)


def validate_images(sample: Sample) -> list[bytes]:
    """Read the images of a sample, check that they can be used, and return their hashes.

    Raises:
        RowError: for the first one that cannot.
    """
    return [_image_digest(image) for image in sample.images]


def _image_digest(image: ImageSource) -> bytes:
    """Return a hash of an image's bytes, after a check of those that are encoded."""
    if isinstance(image, Image.Image):
        return hashlib.sha256(image.tobytes()).digest()
    data, name = (image.read(), image.name) if isinstance(image, StoredImage) else (read_file(image), printable(image))
    check_image(data, name)
    return hashlib.sha256(data).digest()


def _sort_in(outcome: _Good | Fault, good: list[_Good], faults: list[Fault], check: Callable[[Sample], None]) -> None:
    if isinstance(outcome, Fault):
        faults.append(outcome)
        return
    try:
        check(outcome.sample)
        good.append(outcome)
    except RowError as fault:
        faults.append(Fault(outcome.sample.row, fault.reason, fault.detail))


def _complaint(source: Source, found: Scan, skip_bad: bool, max_bad: float) -> str:
    """Return the sentence that refuses bad rows."""
    reasons = found.by_reason()
    what = f"{source.name}: {len(found.faults)} of {found.rows} rows read are bad: {'; '.join(found.reasons())}."
    if MISSING in reasons and found.with_image == 0:
        return f"{what} Does --image-root name the folder that the image paths start in?"
    if UNREAD in reasons:
        what += " Say what they are, as in --columns question=NAME, or leave them unread with --ignore-fields."
        return f"{what} Known names: {known_names()}"
    if skip_bad:
        return f"{what} That is {found.bad_fraction:.1%}, more than --max-bad {max_bad:.3g} allows"
    return f"{what} Fix them, or leave them out with --on-bad-row skip"
