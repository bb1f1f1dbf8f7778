"""VQAv2's official files: questions, their annotations beside them, and pictures by COCO's file names.

Source: https://visualqa.org/download.html
"""

from pathlib import Path
from typing import Any

from dpn_cli.data.faults import RowError
from dpn_cli.data.fields import Fields, image_fields, present
from dpn_cli.data.formats import Request
from dpn_cli.data.jsonrows import JsonRows, key_of_rows
from dpn_cli.data.naming import split_of
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading
from dpn_cli.data.rowsource import RowSource
from dpn_cli.errors import DataError

_QUESTIONS, _ANNOTATIONS = "questions", "annotations"  # keys of the lists in the two files
_SHOWN, _BEGINNING = 50, 1 << 16  # characters


class VqaFiles(RowSource):
    """The questions of a file, each with the annotation of its number."""

    def __init__(self, questions: Path, annotations: Path | None, places: Places, reading: Reading) -> None:
        """Read both files; without annotations, no question has an answer.

        Raises:
            DataError: if one of them holds no rows, or no field that the user names, or two annotations of a question.
        """
        self.questions = JsonRows(questions)
        self.annotations = JsonRows(annotations) if annotations else None
        annotated = self.annotations.objects() if self.annotations else ()
        self.annotation_of: dict[str, int] = {}
        for index, row in enumerate(annotated):
            if self.annotation_of.setdefault(_number(row), index) != index:
                raise DataError(f"{annotations} has several annotations of the question_id {_number(row)}: leave one")
        self.split = str(self.questions.about.get("data_subtype") or split_of(questions))
        answered = f"answers of {annotations.name}" if annotations else "no answers"
        super().__init__(str(questions), f"VQAv2 questions, {answered}", places, reading)

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.questions)

    def row(self, index: int) -> Any:
        """Return a question with its annotation."""
        row = self.questions.row(index)
        if not isinstance(row, dict):
            return row
        if self.annotations is not None:
            if (number := _number(row)) not in self.annotation_of:
                raise RowError("a question without an annotation", f"no annotation has its question_id, {number}")
            annotation = self.annotations.row(self.annotation_of[number])
            if differ := [key for key in annotation.keys() & row.keys() if annotation[key] != row[key]]:
                raise RowError("a question and its annotation", f"their {', '.join(sorted(differ))} differ")
            row = annotation | row
        if not image_fields(present(row), self.reading.columns):
            raise RowError(
                "no image path",
                f"expected a number as image_id, or a field that --columns image=FIELD names, found {', '.join(row)}",
            )
        return row


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
        if keys.get(path) == _ANNOTATIONS and _annotates(path):
            raise DataError(f"{path} has VQAv2's annotations alone: give its file of questions, or the folder of both")
        return None
    if len(questions) > 1:
        names = ", ".join(each.name for each in questions)
        raise DataError(f"{path} holds several files of questions ({names}): give one of them as --data")
    beside = (each for each in sorted(questions[0].parent.glob("*.json")) if key_of_rows(each) == _ANNOTATIONS)
    annotations = [each for each in beside if split_of(each) == split_of(questions[0])]
    if len(annotations) > 1:
        names = ", ".join(each.name for each in annotations)
        raise DataError(
            f"{questions[0].parent} holds several files of annotations ({names}): leave one beside the questions"
        )
    return VqaFiles(questions[0], annotations[0] if annotations else None, request.places, request.reading)


def _annotates(path: Path) -> bool:
    """Tell by its beginning whether a file has annotations of questions."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        beginning = file.read(_BEGINNING)
    return '"question_id"' in beginning and '"question"' not in beginning


def _number(row: Fields) -> str:
    return str(row.get("question_id"))[:_SHOWN]
