"""One row of any table as a sample: conversations, questions with answers, or captions, and their images."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dpn_cli.calibration.data.faults import RowError
from dpn_cli.calibration.data.samples import ImageSource, Sample, Turn
from dpn_cli.errors import did_you_mean

IMAGE_KEYS = ("images", "image", "file_name")
CHAT_KEYS = ("conversations", "messages")
ANSWER_KEYS = ("answer", "answers", "multiple_choice_answer")
CAPTION_KEYS = ("caption", "captions", "text")
KIND_FIELD = "kind"
PLACEHOLDER = "<image>"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

OpenImage = Callable[[Any], ImageSource]
"""Turns what a row holds for an image into a source; raises RowError for what is none."""


def group(value: Any) -> str | None:
    """Return the group that a field's value names, a text, a number or a truth value; None for what is none."""
    return str(value) if isinstance(value, str | int | float) else None


def mapping(keys: Iterable[str]) -> str:
    """Return in words which fields are read, of those that there are."""
    keys = list(keys)
    images = next((key for key in IMAGE_KEYS if key in keys), None)
    chat = next((key for key in CHAT_KEYS if key in keys), None)
    answer = next((key for key in ANSWER_KEYS if key in keys), None)
    caption = next((key for key in CAPTION_KEYS if key in keys), None)
    if chat is not None:
        text = f"`{chat}` as conversation"
    elif "question" in keys:
        text = "`question` and " + (f"`{answer}`" if answer else "no answer")
    else:
        text = f"stock prompts and `{caption}` as answer" if caption else "stock prompts"
    return f"{f'`{images}`' if images else 'no images'}, {text}"


def is_readable(keys: Iterable[str]) -> bool:
    """Tell whether the fields hold any images or text that `read_row` knows."""
    return not {*IMAGE_KEYS, *CHAT_KEYS, *CAPTION_KEYS, "question"}.isdisjoint(keys)


def read_row(
    row: Any,
    number: int,
    open_image: OpenImage,
    prompts: Sequence[str],
    *,
    without_text: bool = False,
    kind_field: str = KIND_FIELD,
) -> Sample:
    """Read a row of a table.

    Args:
        row: `image` or `images`, and `conversations` [{from, value}], `messages` [{role, content}], `question` with
            `answer` or `answers`, or a `caption`; other fields are ignored.
        number: from 1, names a row that has no id.
        open_image: called for every image.
        prompts: questions for captions and for images alone, in turn.
        without_text: whether a row may be an image alone.
        kind_field: holds the sample's group, a text, a number or a truth value.

    Raises:
        RowError: if it makes no sample.
    """
    if not isinstance(row, dict):
        raise RowError("not an object", f"expected an object, found {type(row).__name__}")
    chat = next((row[key] for key in CHAT_KEYS if row.get(key) is not None), None)
    images = [open_image(image) for image in _image_values(row)]
    if chat is not None:
        system, turns, inline = _read_chat(chat)
        if inline and images:
            raise RowError("images in two places", "images stand in the messages and beside them")
        images = images or [open_image(image) for image in inline]
    else:
        system, turns = "", [_single_turn(row, prompts[(number - 1) % len(prompts)], without_text)]
    return Sample(
        _identity(row.get("id"), number),
        tuple(images),
        tuple(_place(turns, len(images))),
        group(row.get(kind_field)),
        system,
    )


def _image_values(row: dict[str, Any]) -> list[Any]:
    value = next((row[key] for key in IMAGE_KEYS if row.get(key)), None)
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _identity(value: Any, number: int) -> str:
    known = isinstance(value, str | int) and not isinstance(value, bool)
    return _text(str(value), "id") if known and value != "" else str(number)


def _single_turn(row: dict[str, Any], prompt: str, without_text: bool) -> Turn:
    """Read a question and its answer, or a caption as the answer to a stock prompt."""
    if row.get("question") is not None:
        answer = next((row[key] for key in ANSWER_KEYS if row.get(key) is not None), None)
        question = _text(row["question"], "question")
        return Turn(
            question.replace(PLACEHOLDER, "").strip(),
            None if answer is None else _answer(_most_common(answer)),
            question.count(PLACEHOLDER),
        )
    caption = next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), None)
    if caption is None and not without_text:
        raise RowError("no text", "no list under `conversations` or `messages`, no `question` and no `caption`")
    return Turn(prompt, None if caption is None else _answer(caption[0] if _is_filled_list(caption) else caption))


def _most_common(answer: Any) -> Any:
    """Return an answer, or of several people's answers, as VQAv2 has them, the most frequent one."""
    if not _is_filled_list(answer):
        return answer
    answers = [each.get("answer") if isinstance(each, dict) else each for each in answer]
    return Counter(_text(each, "answer") for each in answers).most_common(1)[0][0]


def _is_filled_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _read_chat(messages: Any) -> tuple[str, list[Turn], list[Any]]:
    """Return the system message, the turns with the placeholders before each, and images inside of messages."""
    if not isinstance(messages, list):
        raise RowError("no list of messages", "no list under `conversations` or `messages`")
    system: list[str] = []
    turns: list[Turn] = []
    inline: list[Any] = []
    for message in messages:
        role, text, placeholders, images = _read_message(message)
        inline += images
        if placeholders and role != "user":
            raise RowError(f"{PLACEHOLDER} outside of a question", f"{PLACEHOLDER} in a message of the {role}")
        if role == "user" and turns and turns[-1].answer is None:  # one question in several messages
            last = turns[-1]
            turns[-1] = Turn(f"{last.question}\n{text}".strip(), None, last.images + placeholders)
        elif role == "user":
            turns.append(Turn(text, None, placeholders))
        elif role == "assistant":
            if not turns or turns[-1].answer is not None:
                raise RowError("an answer without a question", "an answer comes before its question")
            turns[-1] = Turn(turns[-1].question, _answer(text), turns[-1].images)
        elif turns:
            raise RowError("a late system message", "a system message comes after the first question")
        else:
            system.append(text)
    if not turns:
        raise RowError("no question")
    return "\n".join(filter(None, system)), turns, inline


def _read_message(message: Any) -> tuple[str, str, int, list[Any]]:
    """Return a message's role, its text, the number of image placeholders and the images that it holds itself."""
    if not isinstance(message, dict):
        raise RowError("not a message", f"expected a message with from and value, found {type(message).__name__}")
    name = message.get("from") or message.get("role")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        hint = did_you_mean(name, _ROLES) if isinstance(name, str) else ""
        raise RowError("unknown role", f"a message from {name!r:.50}, expected one of {', '.join(_ROLES)}.{hint}")
    content = message.get("value") if message.get("value") is not None else message.get("content")
    texts, placeholders, images = [], 0, []
    for each in content if isinstance(content, list) else [content]:
        part = each if isinstance(each, dict) else {"type": "text", "text": each}
        kind = part.get("type")
        if kind == "image":
            placeholders += 1
            images += [part[key] for key in ("image", "path") if part.get(key)][:1]
        elif kind == "text":
            text = _text(part.get("text"), f"message from {name}")
            placeholders += text.count(PLACEHOLDER)
            texts.append(text.replace(PLACEHOLDER, "").strip())
        else:
            raise RowError("unknown content", f"a part of type {kind!r:.50}, expected text or image")
    if images and len(images) != placeholders:
        raise RowError("images and placeholders", f"a message has {placeholders} places for {len(images)} images")
    return role, "\n".join(filter(None, texts)), placeholders, images


def _place(turns: list[Turn], num_images: int) -> list[Turn]:
    """Return the turns with every image at one of them.

    Raises:
        RowError: if there are more or fewer placeholders than images, or a question is empty.
    """
    places = sum(turn.images for turn in turns)
    if places == 0:
        turns = [Turn(turns[0].question, turns[0].answer, num_images), *turns[1:]]
    elif places != num_images:
        more = f"more {PLACEHOLDER} than images" if places > num_images else f"more images than {PLACEHOLDER}"
        raise RowError(more, f"{PLACEHOLDER} stands {places} times, the row has {num_images} images")
    if not all(turn.question or turn.images for turn in turns):
        raise RowError("an empty question")
    return turns


def _answer(value: Any) -> str:
    text = _text(str(value) if isinstance(value, int | float) else value, "answer")
    if not text:
        raise RowError("an empty answer")
    if PLACEHOLDER in text:
        raise RowError(f"{PLACEHOLDER} outside of a question", f"{PLACEHOLDER} in an answer")
    return text


def _text(value: Any, what: str) -> str:
    """Return a text without the space around it."""
    if not isinstance(value, str):
        raise RowError("no text", f"expected text for the {what}, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError("broken text", f"the {what} holds half of a surrogate pair") from None
    return value.strip()
