"""Reading what users bring, and labels that are exact."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_cli.calibration.data import Sample, Turn, load_data
from dpn_cli.calibration.encoding import IGNORED, collate, encode
from dpn_cli.errors import DataError


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "a.png"
    path.parent.mkdir()
    Image.new("RGB", (50, 40), (200, 30, 30)).save(path)
    return path


@pytest.fixture(scope="module")
def processor(tiny_llava: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_llava)


def llava_row(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nwhat colour is this ?"}, {"from": "gpt", "value": "red"}]
    return {"id": "x", "image": "images/a.png", "conversations": turns, **changes}


def write(path: Path, rows: list[Any]) -> Path:
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_files(tmp_path: Path, picture: Path, name: str) -> None:
    chat = [{"role": "user", "content": "which shape ?"}, {"role": "assistant", "content": " circle "}]
    rows = [llava_row(), {"images": [str(picture)] * 2, "messages": chat}, llava_row(image=None)]
    first, second = load_data(str(write(tmp_path / name, rows)))
    assert first == Sample("x", (picture,), (Turn("what colour is this ?", "red"),))
    assert second == Sample("2", (picture, picture), (Turn("which shape ?", "circle"),))


def test_image_folder_takes_the_stock_prompts_in_turn(picture: Path) -> None:
    Image.new("RGB", (8, 8)).save(picture.with_name("b.jpg"))
    samples = list(load_data(str(picture.parent), prompts=("one ?", "two ?")))
    assert [(s.id, s.turns) for s in samples] == [("a.png", (Turn("one ?"),)), ("b.jpg", (Turn("two ?"),))]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([llava_row(image="images/none.png")], "row 1: no image file"),
        (
            [llava_row(), llava_row(conversations=[{"from": "alien", "value": "hm"}])],
            "row 2: a message needs from",
        ),
        ([llava_row(conversations="hm")], "row 1: no list under"),
        ([llava_row(conversations=[{"from": "gpt", "value": "red"}])], "row 1: an answer comes before"),
        (["hm"], "row 1: expected an object"),
        ([llava_row(image=None)], "no row with an image"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, picture: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(str(write(tmp_path / "data.json", rows)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", "{", "is not JSON"),
        ("data.json", "{}", "expected a list"),
        ("data.jsonl", "{}\n{", "is not JSONL"),
        ("data.csv", "", "expected a LLaVA"),
        ("empty", None, "no images"),
        ("nowhere", "missing", "does not exist"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif content != "missing":
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_data(str(path))


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("GIF89a")
    with pytest.raises(DataError, match=r"a\.png is no image"):
        Sample("x", (path,), (Turn("what ?", "red"),)).open_images()


def test_labels_are_the_answers_and_the_prompt_is_the_processors(processor: Any, picture: Path) -> None:
    tokenizer = processor.tokenizer
    turns = (Turn("what colour is this ?", "red"), Turn("which shape ?", "blue circle"))
    example = encode(Sample("x", (picture,), turns), processor, answer_tokens=8)
    answers = example.labels[example.labels != IGNORED].tolist()
    assert tokenizer.decode(answers) == "red </s> blue circle </s>"
    assert (example.input_ids[example.labels != IGNORED] == example.labels[example.labels != IGNORED]).all()
    prompt = processor(
        text="USER: <image>\nwhat colour is this ? ASSISTANT:",
        images=Image.open(picture),
        return_tensors="pt",
    )
    length = prompt["input_ids"].shape[1]
    assert (example.input_ids[:length] == prompt["input_ids"][0]).all()
    assert (example.pixel_values == prompt["pixel_values"]).all()
    rest = tokenizer.decode(example.input_ids[length:])
    assert rest == "red </s> USER : which shape ? ASSISTANT : blue circle </s>"


def test_long_answers_are_shortened_without_an_end(processor: Any, picture: Path) -> None:
    turns = (Turn("what ?", "red green blue yellow"), Turn("what ?", "red"))
    example = encode(Sample("x", (picture,), turns), processor, answer_tokens=2)
    assert processor.tokenizer.decode(example.labels[example.labels != IGNORED]) == "red green"
    assert example.labels[-1] != IGNORED, "nothing may follow a shortened answer"


def test_batches_are_padded_on_the_left(processor: Any, picture: Path) -> None:
    examples = [
        encode(Sample("x", (picture,) * n, (Turn("what ?", "red"),)), processor, answer_tokens=8) for n in (1, 2)
    ]
    batch = collate(examples, pad_token_id=3)
    gap = len(examples[1].input_ids) - len(examples[0].input_ids)
    assert gap > 0
    assert (batch["attention_mask"][0] == 0).sum() == gap and batch["attention_mask"][0, :gap].sum() == 0
    assert (batch["labels"][0, :gap] == IGNORED).all() and (batch["input_ids"][0, :gap] == 3).all()
    assert batch["pixel_values"].shape[0] == 3
