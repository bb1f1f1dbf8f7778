"""COCO's layout: a list of images, and a list of annotations that name them by their ids.

Source: https://cocodataset.org/#format-data
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from dpn_cli.data.faults import RowError
from dpn_cli.data.formats import Request, only_file
from dpn_cli.data.naming import split_of
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading
from dpn_cli.data.rowsource import RowSource
from dpn_cli.errors import DataError

_IMAGES, _ANNOTATIONS = "images", "annotations"
_BEGINNING = 1 << 16  # characters
_FIRST_KEY = re.compile(rf'\s*\{{\s*"(?:info|licenses|categories|type|{_IMAGES}|{_ANNOTATIONS})"\s*:')
_SHOWN = 50  # characters


class CocoFile(RowSource):
    """The annotations of a file, each with the file name of its image."""

    def __init__(
        self, path: Path, images: Sequence[Any], annotations: Sequence[Any], places: Places, reading: Reading
    ) -> None:
        """Understand the annotations.

        Raises:
            DataError: if they hold no text, or it is not clear which image one is of.
        """
        self.annotations = annotations
        self.file_names: dict[str, Any] = {}
        for each in images:
            if isinstance(each, dict):
                number, name = str(each.get("id"))[:_SHOWN], each.get("file_name")
                if self.file_names.setdefault(number, name) != name:
                    raise DataError(
                        f"{path} gives the id {number} to two images, {self.file_names[number]} and {name}: give each "
                        "an id of its own"
                    )
        self.split = split_of(path)
        super().__init__(str(path), "COCO annotations", places, reading)
        if not self.fullest:
            raise DataError(f"{path}: no annotation has the id of one of its images as image_id")
        if self.images_alone:
            raise DataError(
                f"{path} has annotations without text (they have {', '.join(self.fullest)}): expected captions, or "
                "questions and answers"
            )

    def __len__(self) -> int:
        """Return the number of annotations."""
        return len(self.annotations)

    def row(self, index: int) -> Any:
        """Return an annotation with the file name of its image."""
        row = self.annotations[index]
        if not isinstance(row, dict):
            return row
        number = str(row.get("image_id"))[:_SHOWN]
        if number not in self.file_names:
            raise RowError("an annotation without an image", f"no image has the id {number}")
        return row | {"image": self.file_names[number]}


def open_coco(request: Request) -> CocoFile | None:
    """Open a file with images and annotations, or the one of a folder.

    Raises:
        DataError: if there are several in the folder, or it holds no text.
    """
    path = only_file(request, {".json"}, lambda path: is_coco(request, path))
    lists = _lists(request, path) if path else None
    if path is None or lists is None:
        return None
    beside = path.parent.parent if path.parent.name == _ANNOTATIONS else path.parent  # as the downloads unpack
    places = Places(request.image_root or beside, request.allow_urls)
    return CocoFile(path, *lists, places, request.reading)


def is_coco(request: Request, path: Path) -> bool:
    """Tell whether a file has the layout."""
    return _lists(request, path) is not None


def _lists(request: Request, path: Path) -> tuple[list[Any], list[Any]] | None:
    """Return the same as `_read_lists`, which takes its time, at once when a file is asked about again."""
    if path not in request.parsed:
        request.parsed.clear()
        request.parsed[path] = _read_lists(path)
    found: tuple[list[Any], list[Any]] | None = request.parsed[path]
    return found


def _read_lists(path: Path) -> tuple[list[Any], list[Any]] | None:
    """Return the images and the annotations of a file; None of one that has another layout."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig")) if _may_be_coco(path) else {}
    except (OSError, ValueError, RecursionError):
        return None  # what is wrong with it, the reader of all JSON says
    images, annotations = found.get(_IMAGES), found.get(_ANNOTATIONS)
    return (images, annotations) if _holds(images, "id", "file_name") and _holds(annotations, "image_id") else None


def _holds(rows: Any, *keys: str) -> TypeGuard[list[Any]]:
    """Tell whether something is a list of objects, the first of which has these keys."""
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and rows[0].keys() >= {*keys}


def _may_be_coco(path: Path) -> bool:
    """Tell by its beginning whether a file may have the layout."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return _FIRST_KEY.match(file.read(_BEGINNING)) is not None
    except OSError:
        return False
