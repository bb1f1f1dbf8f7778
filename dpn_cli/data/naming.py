"""Where data sets keep the pictures that their rows name by a number, or by a name that is not the whole path.

Sources: COCO's file names, https://cocodataset.org; ScienceQA's folders, https://github.com/lupantech/ScienceQA
"""

import re
from collections.abc import Iterator
from pathlib import Path

_SPLIT = re.compile(r"(?:train|val|test)(?:-dev)?20\d\d")
_YEARS = (2017, 2014)  # of COCO's pictures, for splits that are named without


def split_of(path: Path) -> str:
    """Return the split that a file's name tells, such as `val2014`; empty if it tells none."""
    return next(iter(_SPLIT.findall(path.stem)), "")


def names_of(number: int, split: str) -> Iterator[str]:
    """Yield the names, without their ends, that a picture with a number may have."""
    for each in _splits(split):
        yield f"COCO_{each}_{number:012}"
    yield f"{number:012}"
    yield f"{number}"


def folders_of(split: str, row: str) -> Iterator[str]:
    """Yield the folders that a picture may be in: that of the data, that of its split, and that of its row.

    Args:
        split: Split of the row; empty if it is not known.
        row: Id of the row; empty for a picture that no row names, which is where it is said to be.
    """
    if not (split or row):
        yield ""
        return
    for below in ("", *_splits(split)):
        for folder in (below, f"images/{below}"):
            yield folder
            yield f"{folder}/{row}" if folder else row


def _splits(split: str) -> list[str]:
    """Return the names that a split goes by; questions for development share the pictures of all test questions."""
    split = split.replace("-dev", "")
    return [split, *(f"{split}{year}" for year in _YEARS if split in ("train", "val", "test"))] if split else []
