"""One row of any table as a sample: conversations, questions with answers, or captions, and their images."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dpn_cli.data.answers import settle_answer
from dpn_cli.data.chat import read_chat, take_image
from dpn_cli.data.choices import answer_letter, ask_for_letter, read_choices
from dpn_cli.data.faults import RowError
from dpn_cli.data.fields import (
    ROLES,
    Columns,
    Fields,
    assign,
    image_fields,
    is_blank,
    present,
    validate_all_read,
    validate_columns,
    validate_media,
    validate_object,
)
from dpn_cli.data.places import HOLDERS, holder
from dpn_cli.data.samples import ImageSource, Sample, Turn
from dpn_cli.data.texts import (
    PLACEHOLDER,
    count_images,
    image_numbers,
    name_images_asked,
    read_answer,
    read_list,
    read_text,
    read_text_alone,
    records,
    spelt_out,
    without_images,
)
from dpn_cli.limits import MAX_ROW_CHARACTERS, MAX_ROW_IMAGES, MAX_ROW_TURNS

KIND_FIELD = "kind"

OpenImage = Callable[[Any], ImageSource]
"""Turns what a row holds for an image into a source; raises RowError for what is none."""


@dataclass(frozen=True)
class Reading:
    """How the rows of a table are read.

    Attributes:
        prompts: questions for captions and for images alone, in turn.
        kind_field: the field that holds a sample's group, see `group`.
        ignored: fields that are left unread.
        columns: Roles of fields, as the user gave them.
    """

    prompts: Sequence[str]
    kind_field: str = KIND_FIELD
    ignored: Collection[str] = ()
    columns: Columns = ()


def group(value: Any) -> str | None:
    """Return the group that a field's value names, a text, a number or a truth value; None for what is none."""
    return str(value) if isinstance(value, str | int | float) else None


@dataclass(frozen=True)
class _Text:
    """What the text of a row says.

    Attributes:
        read: names of the fields that hold it; none for a stock prompt.
        turns: the questions and answers, at least one.
        system: the system message, or the empty string.
        inline: images that stand in the messages.
        has_question: whether the question is the row's own.
        numbers: Numbers of the images that the text names, from 1.
    """

    read: tuple[str, ...]
    turns: list[Turn]
    system: str = ""
    inline: Sequence[Any] = ()
    has_question: bool = True
    numbers: Sequence[int] = ()


def read_row(row: Any, number: int, open_image: OpenImage, reading: Reading, *, images_alone: bool = False) -> Sample:
    """Read a row of a table.

    Args:
        row: the row, an object; `fields.ROLES` says what its fields are read as.
        number: the row's number, from 1; it names a row without an id.
        open_image: turns what stands for an image into a source, see `OpenImage`.
        reading: how the row is read.
        images_alone: whether a row without text is asked a stock prompt, see `RowSource.images_alone`.

    Raises:
        RowError: if it makes no sample, or one that would pass over text or images of the row.
    """
    if not isinstance(row, dict):
        raise RowError("not an object", f"expected an object, found {type(row).__name__}")
    validate_columns(row, reading.columns)
    fields = present(row, reading.ignored)
    validate_media(fields)
    roles = assign(fields, reading.columns)
    roles = roles if "answer" in dict(reading.columns) else settle_answer(fields, roles)
    image_names = image_fields(fields, reading.columns)
    if not image_names and "conversation" in roles:
        pairs, image = take_image(spelt_out(fields[roles["conversation"]]))
        fields, image_names = {**fields, roles["conversation"]: pairs, **image}, list(image)
    images = _open_all([image for name in image_names for image in _images(fields[name])], open_image)
    text = _read_text(fields, roles, reading.prompts[(number - 1) % len(reading.prompts)])
    if text.inline and images:
        raise RowError("images in two places", "there are images in the messages and outside of them")
    images = images or _open_all(text.inline, open_image)
    _validate_numbers(text.numbers, len(images))
    validate_all_read(
        fields,
        {
            *text.read,
            reading.kind_field,
            KIND_FIELD,
            *image_names,
            *(ROLES["image"] if "image" in dict(reading.columns) else ()),  # the user has chosen among them
            *(roles[role] for role in ("system", "id") if role in roles),
        },
        has_image=bool(images),
        has_question=text.has_question,
        has_answer=text.turns[-1].answer is not None,
    )
    if not text.read and not (images and images_alone):
        raise RowError("no text", "no conversation, no question and no caption")
    system = "\n".join(filter(None, (_system(fields, roles), text.system)))
    _validate_text(text.turns, system)
    return Sample(
        _identity(fields.get(roles.get("id", "")), number),
        tuple(images),
        tuple(_place(text.turns, len(images))),
        group(fields.get(reading.kind_field)),
        system,
    )


def _validate_text(turns: Sequence[Turn], system: str) -> None:
    """Check that a row has no more text and turns than can be encoded in seconds."""
    characters = len(system) + sum(len(turn.question) + len(turn.answer or "") for turn in turns)
    _validate_length("characters of text", characters, MAX_ROW_CHARACTERS)
    _validate_length("turns", len(turns), MAX_ROW_TURNS)


def _validate_length(what: str, found: int, most: int) -> None:
    if found > most:
        raise RowError("too long", f"{found:,} {what}, at most {most:,} are read")


def _images(value: Any) -> list[Any]:
    value = read_list(value)
    return value if isinstance(value, list) else [value] if value != "" else []


def _validate_numbers(numbers: Sequence[int], num_images: int) -> None:
    for number in numbers:
        if not 1 <= number <= num_images:
            raise RowError("images and their numbers", f"the text names image {number} of {num_images}")


def _open_all(held: Sequence[Any], open_image: OpenImage) -> list[ImageSource]:
    _validate_length("images", len(held), MAX_ROW_IMAGES)
    return [_open(image, open_image) for image in held]


def _open(image: Any, open_image: OpenImage) -> ImageSource:
    source = open_image(image)
    while isinstance(image, dict):
        validate_object(image, (*HOLDERS, "detail"), "an image")
        image = image.get(holder(image))
    return source


def _system(fields: Fields, roles: dict[str, str]) -> str:
    return read_text_alone(fields[roles["system"]], "system message") if "system" in roles else ""


def _identity(value: Any, number: int) -> str:
    known = isinstance(value, str | int) and not isinstance(value, bool)
    return read_text(str(value), "id") if known and value != "" else str(number)


def _read_text(fields: Fields, roles: dict[str, str], prompt: str) -> _Text:
    """Read a conversation, else a question, else a caption, else ask a stock prompt."""
    if "conversation" in roles:
        system, turns, inline = read_chat(spelt_out(fields[roles["conversation"]]))
        return _Text((roles["conversation"],), turns, system, inline)
    if "question" in roles:
        return _read_question(fields, roles)
    if "caption" in roles:
        caption = fields[roles["caption"]]
        _validate_plain(caption)
        answer = read_answer(caption[0] if isinstance(caption, list) else caption)
        return _Text((roles["caption"],), [Turn(prompt, answer)], has_question=False)
    return _Text((), [Turn(prompt)], has_question=False)


def _validate_plain(caption: Any) -> None:
    """Check that a caption is not a row of its own, packed into text."""
    packed = spelt_out(caption)
    if isinstance(packed, dict) and isinstance(caption, str):
        raise RowError("JSON in a caption", f"expected text, found an object of {', '.join(packed)} as text: unpack it")


def _read_question(fields: Fields, roles: dict[str, str]) -> _Text:
    """Read a question with what it refers to, its choices and its answer."""
    read = [roles["question"]]
    asked, answer = records(fields[roles["question"]]), None
    if isinstance(asked, list):  # `prompt` and `completion` as trainers take them, each a list of messages
        return _read_prompt(asked, fields, roles)
    question = read_text(asked, "question")
    if "context" in roles:
        read.append(roles["context"])
        if not is_blank(context := fields[roles["context"]]):
            question = f"{read_text(context, 'context')}\n{question}"
    if "input" in roles:
        read.append(roles["input"])
        if not is_blank(about := fields[roles["input"]]):
            question = f"{question}\n{read_text(about, 'input')}"
    choices, names = read_choices(fields, roles.get("choices"))
    numbers = image_numbers("\n".join([question, *map(str, choices)]))
    question = name_images_asked(question)
    question = ask_for_letter(question, choices) if choices else question
    if "answer" in roles:
        read.append(roles["answer"])
        value = fields[roles["answer"]]
        answer = answer_letter(value, choices) if choices else read_answer(value)
    turn = Turn(without_images(question), answer, count_images(question))
    return _Text((*read, *names), [turn], numbers=numbers)


def _read_prompt(messages: list[Any], fields: Fields, roles: dict[str, str]) -> _Text:
    """Read a question that is a list of messages, with its answer, a list of messages or a text."""
    if not any(isinstance(message, dict) for message in messages):
        raise RowError(
            "a list of questions", f"expected one question, or messages, found a list of {len(messages)} items"
        )
    read = tuple(roles[role] for role in ("question", "answer") if role in roles)
    answers = [records(fields[name]) for name in read[1:]]
    said = [a if isinstance(a, list) else [{"role": "assistant", "content": read_answer(a)}] for a in answers]
    system, turns, inline = read_chat([*messages, *(message for answer in said for message in answer)])
    return _Text(read, turns, system, inline)


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
        raise RowError(more, f"{PLACEHOLDER} in the text: {places}, images of the row: {num_images}")
    if not all(turn.question or turn.images for turn in turns):
        raise RowError("an empty question")
    return turns
