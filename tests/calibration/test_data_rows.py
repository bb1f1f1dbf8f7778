"""Rows of any table as samples."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_cli.calibration.data.faults import RowError
from dpn_cli.calibration.data.images import image_path
from dpn_cli.calibration.data.llava import LlavaFile
from dpn_cli.calibration.data.rows import mapping, read_row
from dpn_cli.calibration.data.samples import Sample, Turn
from dpn_cli.calibration.data.scan import scan
from dpn_cli.errors import DataError

ROOT = Path("pictures")
A, B = ROOT / "a.png", ROOT / "b.png"


def read(row: Any, **options: Any) -> Sample:
    return read_row(row, 3, lambda value: image_path(ROOT, value), ("stock ?",), **options)


def say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_images_stand_where_their_placeholders_are() -> None:
    messages = [
        say("system", "Be brief."),
        say("user", "<image> what ?"),
        say("assistant", "red"),
        say("user", "and <image><image> ?"),
    ]
    sample = read({"image": ["a.png", "b.png", "a.png"], "messages": messages})
    assert sample.turns == (Turn("what ?", "red", 1), Turn("and  ?", None, 2))
    assert sample.system == "Be brief."
    assert sample.asked == 1
    assert sample.images_until(0) == (A,)
    assert sample.answered("blue").turns[-1] == Turn("and  ?", "blue", 2)


@pytest.mark.parametrize(
    ("parts", "images"),
    [
        ([{"type": "image"}, {"type": "text", "text": "what ?"}], ["a.png"]),
        ([{"type": "text", "text": "what ?"}, {"type": "image", "image": "a.png", "text": None}], None),
        ([{"type": "image", "path": "a.png"}, "what ?"], []),
    ],
)
def test_messages_of_parts(parts: list[Any], images: Any) -> None:
    sample = read({"images": images, "messages": [say("user", parts), say("assistant", "red")]})
    assert (sample.images, sample.turns) == ((A,), (Turn("what ?", "red", 1),))


def test_a_question_in_several_messages_is_one() -> None:
    row = {"messages": [say("user", "<image>"), say("user", "what ?"), say("assistant", "red")], "image": "a.png"}
    assert read(row).turns == (Turn("what ?", "red", 1),)


@pytest.mark.parametrize(
    ("row", "turn"),
    [
        ({"question": "what ?", "answer": "red"}, Turn("what ?", "red", 1)),
        ({"question": "<image>\nwhat ?", "answer": 3}, Turn("what ?", "3", 1)),
        ({"question": "what ?", "answers": ["a", "b", "b"]}, Turn("what ?", "b", 1)),
        ({"question": "what ?", "answers": [{"answer": "yes", "id": 1}]}, Turn("what ?", "yes", 1)),
        ({"question": "what ?"}, Turn("what ?", None, 1)),
        ({"caption": "a cat"}, Turn("stock ?", "a cat", 1)),
        ({"captions": ["a cat", "two"]}, Turn("stock ?", "a cat", 1)),
    ],
)
def test_questions_and_captions(row: dict[str, Any], turn: Turn) -> None:
    assert read({"image": "a.png", **row}).turns == (turn,)


def test_an_image_alone_is_a_sample_only_where_no_row_has_text() -> None:
    assert read({"image": "a.png"}, without_text=True).turns == (Turn("stock ?", None, 1),)
    with pytest.raises(RowError, match="no text"):
        read({"image": "a.png"})


def test_inline_images_and_images_beside_them_are_refused() -> None:
    message = say("user", [{"type": "image", "image": "a.png"}, "what ?"])
    with pytest.raises(RowError, match="two places"):
        read({"image": "b.png", "messages": [message]})


def test_the_mapping_is_put_in_words() -> None:
    assert mapping(["image", "question", "answers"]) == "`image`, `question` and `answers`"
    assert mapping(["images", "messages", "text"]) == "`images`, `messages` as conversation"
    assert mapping(["file_name", "text"]) == "`file_name`, stock prompts and `text` as answer"


words = st.sampled_from(["<image> what ?", "what ?", "red", "", "user", "gpt", "text", "image", "\ud800", "a\0.png"])
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | words
KEYS = [
    "id", "kind", "image", "images", "conversations", "messages", "question", "answer", "answers", "caption", "text",
    "from", "value", "role", "content", "type", "path", "bytes",
]  # fmt: skip
keys = st.sampled_from(KEYS) | st.text(max_size=3)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=20
)
message = st.fixed_dictionaries({"from": words | plain, "value": words | anything})
rows = anything | st.fixed_dictionaries(
    {"conversations": st.lists(message | anything, max_size=4)}, optional={"image": anything, "id": anything}
)


@settings(deadline=None)
@given(row=rows, without_text=st.booleans())
def test_any_row_makes_a_sample_or_has_a_named_fault(row: Any, without_text: bool) -> None:
    try:
        sample = read(row, without_text=without_text)
    except RowError as fault:
        assert fault.reason and fault.detail
        return
    assert sum(turn.images for turn in sample.turns) == len(sample.images)
    assert all(turn.question or turn.images for turn in sample.turns)
    assert all(turn.answer for turn in sample.turns[:-1]) and sample.turns[-1].answer != ""
    assert "<image>" not in "".join(f"{turn.question}{turn.answer}" for turn in sample.turns)


@settings(deadline=None)
@given(text=st.text(alphabet='[]{}",:\\1a \n', max_size=40) | st.lists(rows, max_size=3).map(json.dumps))
def test_any_text_is_read_or_refused_in_one_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(text)
    try:
        data = scan(LlavaFile(path, ROOT, ("stock ?",)), skip_bad=True, max_bad=1.0, limit=None, seed=0)
    except DataError as error:
        assert str(path) in str(error)
        return
    assert data.scan.rows == data.scan.available
    assert all(fault.row and fault.reason for fault in data.scan.faults)
