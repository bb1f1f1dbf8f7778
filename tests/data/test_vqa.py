"""VQAv2's official files: which two belong together, where pictures are, and what is wrong by row."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import DataError

QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"


def write(folder: Path, split: str = "val2014", picture: str = "val2014/COCO_val2014_{:012}.jpg") -> Path:
    """Write two questions about one picture, and their annotations in the other order; return the questions."""
    numbers = (70, 71)
    questions = [{"image_id": 7, "question": f"what {number} ?", "question_id": number} for number in numbers]
    answers = [{"answer": answer} for answer in ("yes", "no", "no")]
    annotations = [{"question_id": number, "image_id": 7, "answers": answers} for number in reversed(numbers)]
    path = folder / picture.format(7)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9)).save(path, format="PNG")
    for name, key, rows in ((QUESTIONS, "questions", questions), (ANNOTATIONS, "annotations", annotations)):
        (folder / name.format(split)).write_text(json.dumps({"info": {"year": 2014}, "data_subtype": split, key: rows}))
    return folder / QUESTIONS.format(split)


def load(path: Path, **options: Any) -> Any:
    return load_data(DataOptions(str(path), **options))


@pytest.mark.parametrize(
    "picture", ["val2014/COCO_val2014_{:012}.jpg", "COCO_val2014_{:012}.jpg", "images/val2014/{:012}.jpg", "{:012}.jpg"]
)
def test_pictures_are_found_by_cocos_file_names(tmp_path: Path, picture: str) -> None:
    questions = write(tmp_path, picture=picture)
    for data in (tmp_path, questions):
        loaded = load(data)
        assert [(s.id, s.turns[0].question, s.turns[0].answer) for s in loaded.samples] == [
            ("70", "what 70 ?", "no"), ("71", "what 71 ?", "no"),
        ]  # fmt: skip
        assert "VQAv2 questions, answers of v2_mscoco_val2014_annotations.json" in loaded.scan.format


def test_the_test_split_of_2015_is_unanswered_and_shares_its_pictures(tmp_path: Path) -> None:
    questions = write(tmp_path, "test-dev2015", "test2015/COCO_test2015_{:012}.jpg")
    (tmp_path / ANNOTATIONS.format("test-dev2015")).unlink()
    assert load(questions).scan.unanswered == 2


def test_other_questions_under_that_key_keep_their_images(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "what ?", "answer": "red"}]
    (tmp_path / "rows.json").write_text(json.dumps({"questions": rows}))
    [sample] = load(tmp_path / "rows.json").samples
    assert (sample.images, sample.turns[0].answer) == ((tmp_path / "a.png",), "red")


def test_several_splits_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, "train2014")
    questions = write(tmp_path)
    with pytest.raises(
        DataError, match=r"several files of questions \(.*train2014.*val2014.*give one of them as --data"
    ):
        load(tmp_path)
    assert "answers of v2_mscoco_val2014_ann" in load(questions).scan.format
    (tmp_path / "other_val2014.json").write_text((tmp_path / ANNOTATIONS.format("val2014")).read_text())
    with pytest.raises(DataError, match="several files of annotations"):
        load(questions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_id": 9}, "row 2: a question without an annotation .no annotation has its question_id, 9"),
        ({"question_id": [9]}, "row 2: a question without an annotation"),
        ({"image_id": 8}, r"row 2: a question and its annotation \(their image_id differ\)"),
    ],
)
def test_faults_are_named_by_row(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    questions = write(tmp_path)
    data = json.loads(questions.read_text())
    data["questions"][1] |= change
    questions.write_text(json.dumps(data))
    with pytest.raises(DataError, match=message):
        load(questions)
    assert load(questions, on_bad_row="skip", max_bad=0.5).scan.with_image == 1


@pytest.mark.parametrize(("number", "file"), [(8, "COCO_val2014_000000000008"), ("x", "x")])
def test_pictures_that_are_missing_are_named(tmp_path: Path, number: int | str, file: str) -> None:
    questions = write(tmp_path)
    second = json.loads(questions.read_text())["questions"][1]["question_id"]
    for path in (questions, tmp_path / ANNOTATIONS.format("val2014")):
        data = json.loads(path.read_text())
        [row] = [row for row in (data.get("questions") or data["annotations"]) if row["question_id"] == second]
        row["image_id"] = number
        path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=rf"row 2: missing image file .*/{file}\)"):
        load(questions)


def test_annotations_alone_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match="VQAv2's annotations alone: give its file of questions"):
        load(tmp_path / ANNOTATIONS.format("val2014"))


def test_two_annotations_of_a_question_are_refused(tmp_path: Path) -> None:
    questions = write(tmp_path)
    path = tmp_path / ANNOTATIONS.format("val2014")
    data = json.loads(path.read_text())
    data["annotations"].append(data["annotations"][0])
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"v2_mscoco_val2014_annotations\.json has several annotations of .* 71: leave"):
        load(questions)
