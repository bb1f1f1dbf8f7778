"""Rows of any table as samples."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpn_cli.data.choices import INSTRUCTION
from dpn_cli.data.faults import UNREAD, RowError
from dpn_cli.data.fields import mapping
from dpn_cli.data.llava import LlavaFile
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading, read_row
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.data.scan import scan
from dpn_cli.errors import DataError

ROOT = Path("pictures")
READING = Reading(("stock ?",))
PLACES = Places(ROOT)
A, B = ROOT / "a.png", ROOT / "b.png"


def read(row: Any, reading: Reading = READING, **options: Any) -> Sample:
    return read_row(row, 3, lambda value: PLACES.find(value, "x", lambda: value), reading, **options)


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
        ([{"type": "image", "url": "a.png", "detail": "high"}, "what ?"], None),
        ([{"type": "image_url", "image_url": {"url": "a.png"}}, "what ?"], None),
        ([{"type": "image_url", "image_url": "a.png"}, "what ?"], None),
        ({"type": ["image", "text"], "text": [None, "what ?"]}, ["a.png"]),
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
        ({"question": "what ?", "answers": ["Red", "red", "RED", "red", "b", "b", "b"]}, Turn("what ?", "red", 1)),
        ({"question": "what ?", "answers": [{"answer": "yes", "id": 1}]}, Turn("what ?", "yes", 1)),
        ({"question": "what ?"}, Turn("what ?", None, 1)),
        ({"caption": "a cat"}, Turn("stock ?", "a cat", 1)),
        ({"captions": ["a cat", "two"]}, Turn("stock ?", "a cat", 1)),
        ({"question_id": 0, "text": "what ?", "category": "fine colours"}, Turn("what ?", None, 1)),
        ({"text": "what ?", "answer": "red"}, Turn("what ?", "red", 1)),
        ({"text": "a cat", "label": None, "score": 0.9}, Turn("stock ?", "a cat", 1)),
        ({"query": "what ?", "label": ["3.5"], "human_or_machine": 0}, Turn("what ?", "3.5", 1)),
        ({"query": "what ?", "label": "red"}, Turn("what ?", "red", 1)),
        ({"query": "how many ?", "label": [3, 3, 4]}, Turn("how many ?", "3", 1)),
        ({"question": "what ?", "answers": {"answer": ["a", "b", "b"], "id": [1, 2, 3]}}, Turn("what ?", "b", 1)),
        ({"question": "what ?", "answers": {"text": ["a"], "answer_start": [3]}}, Turn("what ?", "a", 1)),
        ({"Question": "what ?", "fullAnswer": "It is red."}, Turn("what ?", "It is red.", 1)),
        ({"question": "what ?", "hint": "It is round.", "answer": "red"}, Turn("It is round.\nwhat ?", "red", 1)),
        ({"question": "what ?", "hint": "nan", "answer": "red"}, Turn("what ?", "red", 1)),
        ({"question": "what ?", "answers": [], "answer": None}, Turn("what ?", None, 1)),
        ({"question": "what ?", "answer": "['24/7', '3.429']"}, Turn("what ?", "24/7", 1)),
        ({"question": "what ?", "answer": "[12, 30, 200, 180]"}, Turn("what ?", "[12, 30, 200, 180]", 1)),
    ],
)
def test_questions_and_captions(row: dict[str, Any], turn: Turn) -> None:
    assert read({"image": "a.png", **row}).turns == (turn,)


SHAPES = "what ?\nA. ball\nB. cube\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("row", "letter"),
    [
        ({"choices": ["ball", "cube"], "answer": 1}, "B"),
        ({"choices": ["ball", "cube"], "answer": 0}, "A"),
        ({"options": ["ball", "cube"], "answer": "1"}, "B"),
        ({"options": ["ball", "cube"], "answer": 1.0}, "B"),
        ({"choices": ["ball", "cube"], "answer": "B"}, "B"),
        ({"choices": ["ball", "cube"], "answer": "(b)"}, "B"),
        ({"choices": ["ball", "cube"], "answer": "cube"}, "B"),
        ({"choices": ["ball", "cube"], "answer": "B. cube"}, "B"),
        ({"choices": ["ball", "cube"], "correct_choice_idx": 1, "rationales": ["It has corners."]}, "B"),
        ({"choices": ["A. ball", "B. cube"], "answer": ["B"]}, "B"),
        ({"choices": ["ball", "cube"], "answer": "Cube"}, "B"),
        ({"choices": ["ball", "cube"], "answer": "1.0"}, "B"),
        ({"choices": {"text": ["ball", "cube"], "label": ["A", "B"]}, "answerKey": "B"}, "B"),
        ({"choices": "['ball', 'cube']", "answer": "B"}, "B"),
        ({"options": {"B": "cube", "A": "ball"}, "answer": "B"}, "B"),
        ({"A": "ball", "B": "cube", "C": None, "D": "nan", "answer": "B"}, "B"),
        ({"choice_a": "ball", "choice_b": "cube", "answer": "B"}, "B"),
        ({"option_A": "ball", "option_B": "cube"}, None),
        ({"choices": ["ball", "cube"]}, None),
        ({"choices": ["ball", "cube"], "lecture": "Balls are round.", "solution": "It has corners.", "answer": 1}, "B"),
    ],
)
def test_choices_stand_in_the_question_and_the_answer_is_a_letter(row: dict[str, Any], letter: str | None) -> None:
    assert read({"image": "a.png", "question": "what ?", **row}).turns == (Turn(SHAPES, letter, 1),)


@pytest.mark.parametrize("question", ["what ?\nA. ball\nB. cube", "what ? Options: (A) ball (B) cube"])
def test_what_the_question_says_of_its_choices_is_not_said_again(question: str) -> None:
    for asked in (question, f"{question}\n{INSTRUCTION}"):
        [turn] = read({"image": "a.png", "question": asked, "choices": ["ball", "cube"], "answer": "cube"}).turns
        assert turn == Turn(f"{question}\n{INSTRUCTION}", "B", 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"choices": ["ball", "cube"], "answer": 2}, "none of the choices"),
        ({"choices": ["ball", "cube"], "answer": -1}, "none of the choices"),
        ({"choices": ["ball", "cube"], "answer": "C"}, "none of the choices"),
        ({"choices": ["ball", "cube"], "answer": ["A", "B"]}, "none of the choices"),
        ({"choices": ["1", "2", "3"], "answer": "2"}, "ambiguous"),
        ({"choices": ["1.0", "2.5"], "answer": 1.0}, "ambiguous"),
        ({"choices": ["B", "A"], "answer": "B"}, "ambiguous"),
        ({"choices": ["ball", "ball"], "answer": "ball"}, "ambiguous"),
        ({"choices": "ball or cube", "answer": "A"}, "unknown choices"),
        ({"choices": {"x": "ball", "y": "cube"}, "answer": "A"}, "unknown choices"),
        ({"choices": ["one.png", "two.jpg"], "answer": "A"}, "choices that are images"),
        ({"choices": ["<image>", "cube"], "answer": "A"}, "<image> outside of a question"),
        ({"choices": ["<image 2>", "<image 3>"], "answer": "A"}, "images and their numbers"),
        ({"A": "ball", "B": "cube", "D": "cone", "answer": "A"}, "unknown choices"),
    ],
)
def test_choices_that_are_not_understood_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as refusal:
        read({"image": "a.png", "question": "what ?", **row})
    assert reason in refusal.value.reason


@pytest.mark.parametrize("choices", [["1", "2", "3"], ["A", "B", "C"], ["A.D.", "B.C.", "C.E."]])
def test_choices_that_look_like_numbers_or_letters_keep_their_text(choices: list[str]) -> None:
    turn = read({"image": "a.png", "question": "what ?", "choices": choices, "answer": 2}).turns[0]
    assert f"\nC. {choices[2]}\n" in turn.question and turn.answer == "C"


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "Name the colour of", "input": "car"}, "Name the colour of\ncar"),
        ({"instruction": "What is this?", "input": ""}, "What is this?"),
        ({"input": "what ?"}, "what ?"),
    ],
)
def test_what_an_instruction_is_about_follows_it(row: dict[str, Any], question: str) -> None:
    assert read({"images": ["a.png"], "output": "red", **row}).turns == (Turn(question, "red", 1),)


TWO_TURNS = (Turn("what ?", "red", 1), Turn("where ?", "left"))


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": {"from": ["human", "gpt"] * 2, "value": ["<image>\nwhat ?", "red", "where ?", "left"]}},
        {"messages": {"role": ["user", "assistant"] * 2, "content": ["what ?", "red", "where ?", "left"], "x": None}},
        {"texts": [{"user": "what ?", "assistant": "red", "source": "x"}, {"user": "where ?", "assistant": "left"}]},
        {"texts": {"user": ["what ?", "where ?"], "assistant": ["red", "left"]}},
        {
            "conversations": json.dumps(
                [{"user": "what ?", "assistant": "red"}, {"user": "where ?", "assistant": "left"}]
            )
        },
        {
            "prompt": [say("user", "what ?"), say("assistant", "red"), say("user", "where ?")],
            "completion": [say("assistant", "left")],
        },
        {"prompt": [say("user", "what ?"), say("assistant", "red"), say("user", "where ?")], "response": "left"},
    ],
)
def test_conversations_as_columns_and_in_pairs(row: dict[str, Any]) -> None:
    assert read({"image": {"bytes": [None], "path": ["a.png"]}, **row}).turns == TWO_TURNS


@pytest.mark.parametrize("names", [("question", "answer"), ("user", "assistant"), ("human", "gpt")])
def test_pairs_name_their_image(names: tuple[str, str]) -> None:
    pairs = [dict(zip(names, pair, strict=True)) for pair in (("what ?", "red"), ("where ?", "left"))]
    named = [{"image_id": "a.png", "qa_id": number, **pair} for number, pair in enumerate(pairs)]
    for row in ({"image": "a.png", "qas": pairs}, {"id": 7, "qas": named}, {"conversations": json.dumps(named)}):
        sample = read(row)
        assert (sample.images, sample.turns) == ((A,), TWO_TURNS)
    with pytest.raises(RowError, match="their `image_id` differ"):
        read({"qas": [named[0], named[1] | {"image_id": "b.png"}]})


def test_a_system_prompt_beside_the_messages_is_kept() -> None:
    messages = [say("system", "No lists."), say("user", "what ?")]
    assert read({"image": "a.png", "system": "Be brief.", "messages": messages}).system == "Be brief.\nNo lists."
    assert read({"image": "a.png", "system_prompt": "Be brief.", "question": "what ?"}).system == "Be brief."


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"image": "a.png", "user_request": "what ?"}, "`user_request`, of the fields image, user_request"),
        ({"image": "a.png", "request": "what ?", "reply": "red"}, "`request`, `reply`, of"),
        ({"image": "a.png", "label": "red"}, "`label`, of"),
        ({"image": "a.png", "question": "what ?", "reply": "red"}, "`reply`, of"),
        ({"image": "a.png", "question": "what ?", "answer": "red", "passage": "It is round."}, "`passage`, of"),
        ({"image": "a.png", "question": "what ?", "answer": "red", "query": "what"}, "`query`, of"),
        ({"image": "a.png", "question": "图里有什么？", "answer": "red", "q": "什么颜色？"}, "`q`, of"),
        ({"image": "a.png", "text": "what", "label": "red"}, "`label`, of"),
        ({"image": "a.png", "caption": "a cat", "text": "what is it"}, "`text`, of"),
        ({"image": "a.png", "faq": [{"q": "what ?", "a": "red"}]}, "`faq`, of"),
        ({"image": "a.png", "messages": [say("user", "what ?"), say("assistant", "A")], "choices": ["x"]}, "`choices`"),
        ({"image": "a.png", "messages": [say("user", "what ?")], "answer": "red"}, "`answer`, of"),
        ({"image": "a.png", "question": "what ?", "answer": "red", "image_2": {"bytes": b"x"}}, "`image_2`, of"),
        ({"image": "a.png", "img": {"bytes": b"y"}, "caption": "a cat"}, "`img`, of"),
        (
            {"image": "a.png", "question": "what ?", "answer": "2", "option1": "ball", "option2": "cube"},
            "`option1`, `o",
        ),
        ({"view": "a.png", "question": "what ?", "answer": "red"}, "`view`, of"),
        *(
            ({"image": "a.png", "question": "what ?", "answer": "red", **more}, f"`{next(iter(more))}`, of")
            for more in (
                {"image_2": "b.png"},
                {"image2": "b"},
                {"second_image": "dir/b.PNG"},
                {"mask": "b.png"},
                {"photo": "b.png"},
                {"image_path": "dir/b.png"},
                {"mask_path": "b.png"},
                {"right": "b/a.png", "image": "a/a.png"},
                {"views": ["a.png", {"path": "b.png"}]},
                {"image_b": "https://example.org/b.png"},
                {"history": ["Hi", "Hello"]},
                {"rounds": [["Hi", "Hello"]]},
                {"pairs": [{"q": "Hi", "a": "Hello"}]},
            )
        ),
        *(({"image": "a.png", "caption": "a cat", "label": label}, "`label`, of") for label in (0, 1, False, "no")),
        ({"image": "a.png", "messages": [say("user", "what ?")], "answer": 3}, "`answer`, of"),
    ],
)
def test_text_and_images_under_unknown_names_are_refused(row: dict[str, Any], unread: str) -> None:
    for images_alone in (False, True):
        with pytest.raises(RowError) as refusal:
            read(row, images_alone=images_alone)
        assert refusal.value.reason == UNREAD and refusal.value.detail.startswith(unread)


@pytest.mark.parametrize(
    ("message", "keys"),
    [
        (say("user", "what ?") | {"context": "It is round."}, "`context`"),
        (say("user", "what ?") | {"thought": "Hm."}, "`thought`"),
        (
            say("user", "what ?") | {"reasoning_content": "It has corners.", "images": ["b.png"]},
            "`reasoning_content`, `im",
        ),
        (say("user", "what ?") | {"value": "where ?"}, "`content`"),
        (say("user", [{"type": "text", "text": "what ?", "caption": "a cat"}]), "`caption`"),
        (say("user", [{"type": "image", "text": "what ?"}]), "`text`"),
        ({"user": "what ?", "assistant": "red", "context": "It is round."}, "`context`"),
    ],
)
def test_text_and_images_of_messages_under_unknown_keys_are_refused(message: dict[str, Any], keys: str) -> None:
    with pytest.raises(RowError, match="with keys that are not read") as refusal:
        read({"image": "a.png", "messages": [message]})
    assert refusal.value.detail.startswith(keys)


def test_what_describes_a_message_does_not_stop_it() -> None:
    about = {"id": "m 1", "weight": 1, "loss": True, "source": "my own", "thought": None, "name": " "}
    assert read({"image": "a.png", "messages": [say("user", "what ?") | about]}).turns == (Turn("what ?", None, 1),)


def test_an_empty_value_leaves_its_place_to_the_content() -> None:
    for message in (say("user", "<image>what ?") | {"value": ""}, {"from": "human", "value": "what ?", "content": ""}):
        assert read({"image": "a.png", "messages": [message]}).turns == (Turn("what ?", None, 1),)


def test_text_beside_the_path_of_an_image_is_refused() -> None:
    with pytest.raises(RowError, match="an image with keys that are not read: `caption`"):
        read({"images": [{"path": "a.png", "caption": "a cat"}], "question": "what ?"})


ASKED = {"image": "a.png", "question": "what ?"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ASKED, "response": "a dog", "ground_truth": "a cat"}, "two answers"),
        ({**ASKED, "output": "a dog", "label": 1}, "two answers"),
        ({"image": "a.png", "prompt": "what ?", "completion": "a cat", "label": False}, "marked as bad"),
        ({"image": "a.png", "messages": [say("user", "?"), say("assistant", "x")], "kto_tag": False}, "marked as bad"),
        ({**ASKED, "question": "what ?\nA. cube\nB. ball", "choices": ["ball", "cube"]}, "another order"),
    ],
)
def test_what_may_be_wrong_is_no_answer(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read(row)


def test_of_several_answers_one_is_read() -> None:
    for more in ({"completion": "red", "label": True}, {"response": "red", "answers": ["red", "pink"]}):
        assert read({**ASKED, **more}).turns == (Turn("what ?", "red", 1),)
    assert read({**ASKED, "output": "3", "answer": 3}).turns[0].answer == "3"
    given = Reading(("stock ?",), columns=(("answer", "target"),))
    assert read({**ASKED, "response": "a dog", "target": "red"}, given).turns[0].answer == "red"


def test_a_system_text_beside_question_and_answer_is_kept() -> None:
    pairs = [{"system": "Be brief.", "user": "what ?", "assistant": "red"}, {"user": "where ?", "assistant": "left"}]
    sample = read({"image": "a.png", "texts": pairs})
    assert (sample.system, sample.turns) == ("Be brief.", TWO_TURNS)


def test_parts_that_number_their_images_are_in_order() -> None:
    def row(*order: Any) -> dict[str, Any]:
        parts = [{"type": "image", "text": None, "index": index} for index in order]
        return {"images": ["a.png", "b.png"], "messages": [say("user", [*parts, "what ?"])]}

    assert read(row(0, 1)).images == read(row(None, None)).images == (A, B)
    for order in ((1, 0), (0, 0), (1, 2), (0, None)):
        with pytest.raises(RowError, match="images out of order"):
            read(row(*order))


@pytest.mark.parametrize(
    "marker",
    [
        "<image 100>", "<image_1>", "<image1>", "<IMAGE>", "<img>", "<img></img>", "<|image|>", "<|image_1|>", "[IMG]",
        "<ImageHere>", "<|vision_start|><|image_pad|>", "<IMG_CONTEXT>", "<image_placeholder>", "<start_of_image>",
        "</image>",
    ],
)  # fmt: skip
def test_other_image_markers_than_llavas_are_named(marker: str) -> None:
    texts = {"question": f"{marker}\nwhat ?", "hint": f"See {marker}", "answer": marker, "system": marker}
    chats = ({"messages": [say(role, f"see {marker}")]} for role in ("system", "user"))
    for row in (*({"question": "what ?", name: text} for name, text in texts.items()), *chats):
        with pytest.raises(RowError, match="an unknown image marker") as refusal:
            read({"image": "a.png", **row})
        assert refusal.value.detail.startswith(marker[: marker.index("]" if "]" in marker else ">") + 1])


def test_angle_brackets_are_no_markers() -> None:
    question = "is <b>a</b> [1] < image_2 and <src='x.png'> 3 > 2 ?"
    assert read({"image": "a.png", "question": question}).turns == (Turn(question, None, 1),)


def test_what_describes_a_row_does_not_stop_it() -> None:
    about = {
        "questionId": "7", "image_id": "x y", "source": "COCO 2017", "split": "train", "l2-category": "fine colours",
        "image_url": "https://example.org/a.png", "coco_url": "https://example.org/b.png", "question_type": "what is",
        "width": 20, "license": "CC BY 4.0", "metadata": {"note": "two words"}, "solution": "red, since it is not blue",
        "multiple_choice_answer": "red", "file_name": "a.png", "path": "train/a.png",
        "original": ".\\a.png", "image_1": "a.png", "checked": True, "tone": "neutral", "empty": " ",
    }  # fmt: skip
    row = {"image": "a.png", "question": "what ?", "answer": "red"}
    assert read(row | about).turns == read(row).turns
    assert read({"image": "a.png", "split": "my train"}, images_alone=True).turns == (Turn("stock ?", None, 1),)


def test_fields_are_left_unread_on_request() -> None:
    reading = Reading(("stock ?",), ignored=("question", "reply"))
    row = {"image": "a.png", "question": "what ?", "reply": "red"}
    assert read(row, reading, images_alone=True).turns == (Turn("stock ?", None, 1),)


@pytest.mark.parametrize(
    "row",
    [
        {"video": "a.mp4", "conversations": [say("user", "what ?")]},
        {"videos": [{"bytes": b"x"}], "question": "what ?"},
        {"question": "<video>\nwhat ?", "answer": "red"},
        {"messages": [say("user", "<audio>what ?")]},
    ],
)
def test_videos_and_sounds_are_no_text(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="only images and text are read") as refusal:
        read(row)
    assert refusal.value.reason == "neither image nor text"
    assert read({"video": None, "videos": [{"bytes": None}], "question": "what ?"}).images == ()


def test_an_image_alone_is_a_sample_only_where_no_row_has_text() -> None:
    assert read({"image": "a.png"}, images_alone=True).turns == (Turn("stock ?", None, 1),)
    with pytest.raises(RowError, match="no question and no caption"):
        read({"image": "a.png"})
    with pytest.raises(RowError, match="no question and no caption"):
        read({"image": None}, images_alone=True)


def test_inline_images_and_images_beside_them_are_refused() -> None:
    message = say("user", [{"type": "image", "image": "a.png"}, "what ?"])
    with pytest.raises(RowError, match="two places"):
        read({"image": "b.png", "messages": [message]})


def test_the_mapping_is_put_in_words() -> None:
    assert mapping(["image", "question", "answers"]) == "`image`, `question` and `answers`"
    assert mapping(["image", "question", "A", "B", "answer"]) == (
        "`image`, `question` with the choices `A`, `B` and `answer`"
    )
    assert mapping(["images", "messages", "text"]) == "`images`, `messages` as conversation"
    assert mapping(["file_name", "text"]) == "`file_name`, stock prompts and `text` as answer"


words = st.sampled_from(
    [
        "data:image/png;base64,iVBO",
        "<image> what ?",
        "what ?",
        "red",
        "",
        "user",
        "gpt",
        "text",
        "image",
        "\ud800",
        "a\0.png",
    ]
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | words
KEYS = [
    "id", "kind", "image", "images", "conversations", "messages", "question", "answer", "answers", "caption", "text",
    "from", "value", "role", "content", "type", "path", "bytes",
    "base64", "url", "image_url", "choices", "A", "B", "hint", "system", "user", "reply",
]  # fmt: skip
keys = st.sampled_from(KEYS) | st.text(max_size=3)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=20
)
message = st.fixed_dictionaries({"from": words | plain, "value": words | anything})
rows = anything | st.fixed_dictionaries(
    {"conversations": st.lists(message | anything, max_size=4)}, optional={"image": anything, "id": anything}
)


@settings(max_examples=40, deadline=None)
@given(row=rows, images_alone=st.booleans())
def test_any_row_makes_a_sample_or_has_a_named_fault(row: Any, images_alone: bool) -> None:
    try:
        sample = read(row, images_alone=images_alone)
    except RowError as fault:
        assert fault.reason and fault.detail
        return
    assert sum(turn.images for turn in sample.turns) == len(sample.images)
    assert all(turn.question or turn.images for turn in sample.turns)
    assert all(turn.answer for turn in sample.turns[:-1]) and sample.turns[-1].answer != ""
    assert "<image>" not in "".join(f"{turn.question}{turn.answer}" for turn in sample.turns)


@example(text="{1:1")
@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet='[]{}",:\\1a \n', max_size=40) | st.lists(rows, max_size=3).map(json.dumps))
def test_any_text_is_read_or_refused_in_one_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(text)
    try:
        data = scan(LlavaFile(path, PLACES, READING), skip_bad=True, max_bad=1.0, limit=None, seed=0)
    except DataError as error:
        assert str(path) in str(error)
        return
    assert data.scan.rows == data.scan.available
    assert all(fault.row and fault.reason for fault in data.scan.faults)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "where ?", "answer": [12, 30, 200, 180]}, r"several numbers: \[12, 30, 200, 180\]: .* as text"),
        ({"question": "where ?", "answer": [0.1, 0.1, 0.5, 0.5]}, "several numbers"),
        ({"question": ["what ?", "where ?"], "answer": ["red", "left"]}, "expected one question, .* a list of 2 items"),
        ({"text": '{"question": "what ?", "chosen": "red"}'}, "an object of question, chosen as text: unpack it"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read({"image": "a.png", **row})
