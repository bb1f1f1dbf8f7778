"""Conversations: lists of messages, in all the forms that trainers and `datasets` store them in."""

import re
from typing import Any

from dpn_cli.data.faults import RowError
from dpn_cli.data.fields import assign, is_blank, present, validate_object
from dpn_cli.data.places import HOLDERS, holder
from dpn_cli.data.samples import Turn
from dpn_cli.data.texts import (
    PLACEHOLDER,
    count_images,
    read_answer,
    read_plain_answer,
    read_text,
    records,
    without_images,
)
from dpn_cli.errors import did_you_mean

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "developer": "system",
}  # fmt: skip
_NAMES = ("from", "role")
_CONTENTS = ("value", "content")
_IMAGE_PARTS = ("image", "image_url", "input_image")  # types of the parts that show an image
_PATHS = re.compile(r"<img>\s*([^<>]+?)\s*</img>")  # in a text, as Qwen-VL's data has them
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_chat(messages: Any) -> tuple[str, list[Turn], list[Any]]:
    """Return the system message, the turns with the placeholders before each, and images inside of messages.

    Raises:
        RowError: if it is no conversation.
    """
    messages = records(messages)
    if not isinstance(messages, list):
        raise RowError("not a list of messages", f"expected a list of messages, found {type(messages).__name__}")
    system: list[str] = []
    turns: list[Turn] = []
    inline: list[Any] = []
    split = [part for each in messages for part in _split(each)]
    _validate_order(split)
    for message in split:
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
            turns[-1] = Turn(turns[-1].question, read_plain_answer(text), turns[-1].images)
        elif turns:
            raise RowError("a late system message", "a system message comes after the first question")
        else:
            system.append(text)
    if not turns:
        raise RowError("no question")
    return "\n".join(filter(None, system)), turns, inline


def take_image(messages: Any) -> tuple[Any, dict[str, Any]]:
    """Return pairs of a question and its answer without the image that all of them name, and that field.

    Source: Visual Genome's questions, https://homes.cs.washington.edu/~ranjay/visualgenome/api.html.

    Raises:
        RowError: if they name several.
    """
    pairs = records(messages)
    if not isinstance(pairs, list) or not all(isinstance(p, dict) and p.keys().isdisjoint(_NAMES) for p in pairs):
        return messages, {}
    name = next((name for pair in pairs if (name := assign(present(pair)).get("image"))), None)
    if name is None:
        return messages, {}
    if any(pair.get(name) != pairs[0].get(name) for pair in pairs):
        raise RowError("questions about several images", f"their `{name}` differ: expected rows of one image each")
    return [{key: value for key, value in pair.items() if key != name} for pair in pairs], {name: pairs[0][name]}


def _split(message: Any) -> list[Any]:
    """Return a question and its answer that stand in one object, under any of their names, as two messages."""
    if not isinstance(message, dict) or message.keys() & set(_NAMES):
        return [message]
    others = assign(message)
    plain = {"system": "system", "user": "question", "assistant": "answer"}
    own = {role: name for name, role in _ROLES.items() if message.get(name) is not None}
    names = {role: own.get(role) or others.get(other, role) for role, other in plain.items()}
    said = {role: message[name] for role, name in names.items() if message.get(name) is not None}
    if "user" not in said:
        return [message]
    validate_object(message, tuple(names.values()), "a message")
    if "assistant" not in own and "assistant" in said:
        said["assistant"] = read_answer(said["assistant"])
    return [{"role": role, "content": content} for role, content in said.items()]


def _validate_order(messages: list[Any]) -> None:
    """Check that the parts for images which number them, as TRL's data does, count up from 0."""
    contents = [records(message.get(key)) for message in messages if isinstance(message, dict) for key in _CONTENTS]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    order = [part.get("index") for part in parts if part.get("type") in _IMAGE_PARTS]
    if any(index is not None for index in order) and order != list(range(len(order))):
        raise RowError("images out of order", f"parts for images with the index {', '.join(map(str, order))}")


def _read_message(message: Any) -> tuple[str, str, int, list[Any]]:
    """Return a message's role, its text, the number of image placeholders and the images that it holds itself."""
    if not isinstance(message, dict):
        raise RowError("not a message", f"expected a message with from and value, found {type(message).__name__}")
    name = next((message[key] for key in _NAMES if message.get(key)), None)
    role = _ROLES.get(name.casefold()) if isinstance(name, str) else None
    if role is None:
        hint = did_you_mean(name, _ROLES) if isinstance(name, str) else ""
        known = ", ".join(_ROLES) + (f".{hint}" if hint else "")
        raise RowError("unknown role", f"a message from {name!r:.50}, expected one of {known}")
    key = max(_CONTENTS, key=lambda key: (not is_blank(message.get(key)), message.get(key) is not None))
    validate_object(message, (*_NAMES, key), "a message")
    content = records(message.get(key))
    texts, placeholders, images = [], 0, []
    for each in content if isinstance(content, list) else [content]:
        part = each if isinstance(each, dict) else {"type": "text", "text": each}
        kind = part.get("type")
        if kind in _IMAGE_PARTS:
            placeholders += 1
            validate_object(part, (*HOLDERS, "type", "detail"), "a part of a message")
            images += [{key: part[key]} for key in [holder(part)] if key is not None]
        elif kind in _TEXT_PARTS:
            validate_object(part, ("type", "text"), "a part of a message")
            text = read_text(part.get("text"), f"message from {name}")
            images += [{"path": path} for path in _PATHS.findall(text)]
            text = _PATHS.sub(PLACEHOLDER, text)
            placeholders += count_images(text)
            texts.append(without_images(text))
        else:
            keys = ", ".join(map(str, part))
            expected = ", ".join((*_TEXT_PARTS, *_IMAGE_PARTS))
            raise RowError("unknown content", f"a part of type {kind!r:.50} with the keys {keys}, expected {expected}")
    if images and len(images) != placeholders:
        raise RowError("images and placeholders", f"a message has {placeholders} placeholders for {len(images)} images")
    return role, "\n".join(filter(None, texts)), placeholders, images
