"""VQAv2's official files: questions, their annotations beside them, and pictures by COCO's file names.

Source: https://visualqa.org/download.html
"""

import re
from pathlib import Path
from typing import Any

from dpn_cli.data.faults import RowError
from dpn_cli.data.fields import Fields, assign
from dpn_cli.data.formats import Request
from dpn_cli.data.images import is_file
from dpn_cli.data.jsonrows import JsonRows, key_of_rows
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading
from dpn_cli.data.rowsource import RowSource
from dpn_cli.errors import DataError

_QUESTIONS, _ANNOTATIONS = "questions", "annotations"  # keys of the lists in the two files
_IMAGE_ID = "image_id"
_SHOWN = 50  # characters
_SPLIT = re.compile(r"(?:train|val|test)(?:-dev)?20\d\d")


class VqaFiles(RowSource):
    """The questions of a file, each with the annotation of its number."""

    def __init__(self, questions: Path, annotations: Path | None, places: Places, reading: Reading) -> None:
        """Read both files; without annotations, no question has an answer.

        Raises:
            DataError: if one of them holds no rows, or no field that the user names.
        """
        self.questions = JsonRows(questions)
        self.annotations = JsonRows(annotations) if annotations else None
        annotated = self.annotations.objects() if self.annotations else ()
        self.annotation_of = {_number(row): index for index, row in enumerate(annotated)}
        self.split = str(self.questions.about.get("data_subtype") or _split_of(questions)).replace("-dev", "")
        answered = f"answers of {annotations.name}" if annotations else "no answers"
        super().__init__(str(questions), f"VQAv2 questions, {answered}", places, reading)

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.questions)

    def row(self, index: int) -> Any:
        """Return a question with its annotation and the path of its picture."""
        row = self.questions.row(index)
        if not isinstance(row, dict):
            return row
        if self.annotations is not None:
            if (number := _number(row)) not in self.annotation_of:
                raise RowError("a question without an annotation", f"no annotation has its question_id, {number}")
            row = self.annotations.row(self.annotation_of[number]) | row
        has_picture = assign(row).get("image", _IMAGE_ID) != _IMAGE_ID
        return row if has_picture else {**row, "image": self._picture(row.get(_IMAGE_ID))}

    def _picture(self, image_id: Any) -> str:
        """Return where a picture is: in a folder of its split or not, under its name of 2014 or of 2017."""
        if not isinstance(image_id, int):
            raise RowError("no image path", f"expected a number as image_id, found {image_id!r:.{_SHOWN}}")
        files = [f"COCO_{self.split}_{image_id:012}.jpg", f"{image_id:012}.jpg"]
        paths = [
            folder + name for name in files for folder in (f"{self.split}/", "", f"images/{self.split}/", "images/")
        ]
        return next((path for path in paths if is_file(self.places.root / path)), paths[0])


def open_vqa(request: Request) -> VqaFiles | None:
    """Open a folder with a file of questions, or such a file, with the annotations beside it.

    Raises:
        DataError: if there are several of either in the folder, or annotations alone.
    """
    path = request.path
    given = [path] if path.is_file() and path.suffix == ".json" else []
    keys = {each: key_of_rows(each) for each in (sorted(path.glob("*.json")) if path.is_dir() else given)}
    questions = [each for each, key in keys.items() if key == _QUESTIONS]
    if not questions:
        return None
    if len(questions) > 1:
        names = ", ".join(each.name for each in questions)
        raise DataError(f"{path} holds several files of questions ({names}): give one of them as --data")
    beside = (each for each in sorted(questions[0].parent.glob("*.json")) if key_of_rows(each) == _ANNOTATIONS)
    annotations = [each for each in beside if _split_of(each) == _split_of(questions[0])]
    if len(annotations) > 1:
        names = ", ".join(each.name for each in annotations)
        raise DataError(
            f"{questions[0].parent} holds several files of annotations ({names}): leave one beside the questions"
        )
    return VqaFiles(questions[0], annotations[0] if annotations else None, request.places, request.reading)


def _number(row: Fields) -> str:
    return str(row.get("question_id"))[:_SHOWN]


def _split_of(path: Path) -> str:
    return next(iter(_SPLIT.findall(path.stem)), "")
