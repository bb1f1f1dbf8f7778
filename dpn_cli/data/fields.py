"""The names that fields go by, in one place: what is read, what is left alone, and what stops a run.

No text and no image of a row is passed over in silence. A field that is not read stops the run if it holds an image, or
text, unless

- its name says that it describes the row: an id, a source, a category, a size (`_DESCRIPTIVE`, the last word counts);
- it is another answer, caption or path of the image than the one that was read, or explains the answer (`_SPARE`);
- question and answer are found, and it holds single words, none of them the path of another image, under a name that
  means neither text nor choices nor images; or
- the user leaves it out.

Of the objects inside of a row, such as messages, everything but the first is read or stops the run.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from dpn_cli.data.faults import UNREAD, RowError
from dpn_cli.data.formats import IMAGE_SUFFIXES
from dpn_cli.errors import DataError, did_you_mean

Fields = Mapping[str, Any]
"""A row's fields that hold something, by name."""

Columns = Sequence[tuple[str, str]]
"""Roles that the user gave, each with the name of the field that has it."""

_PAIRS = ("qa", "qas", "qa_pairs")  # a conversation, but beside a question
ROLES: dict[str, tuple[str, ...]] = {
    "image": (
        "decoded_image", "images", "image", "file_path", "file_name", "image_path", "image_paths", "image_file", "img",
        "img_path", "picture", "photo", "filename", "image_local_name", "imagename", "image_url", "image_name",
        "imgname", "img_name", "image_id", "img_id", "cocoid", "coco_image_id",
    ),
    "conversation": ("conversations", "messages", "conversation", "texts", *_PAIRS),
    "question": ("question", "query", "prompt", "instruction", "problem", "input"),
    "input": ("input",),  # what an instruction is about, as in Alpaca's rows
    "answer": (
        "answer", "answers", "multiple_choice_answer", "label", "labels", "response", "output", "completion", "target",
        "correct_answer", "gt_answer", "ground_truth", "answer_key", "answer_idx", "answer_index", "correct_choice_idx",
        "correct_choice", "correct_option", "solution", "full_answer", "direct_answers", "chosen",
    ),
    "choices": ("choices", "options", "candidates"),
    "context": ("hint", "context"),
    "system": ("system", "system_prompt", "system_message"),
    "caption": ("caption", "captions", "description", "text", "caption_str", "blip_caption", "comment"),
    "id": ("id", "question_id", "custom_id"),
}  # fmt: skip
"""The names of every role, the first that a row has being the one that is read. Letter case does not matter."""

_NAMES_SHOWN = 4  # of a role, in messages
_TEXT_ROLES = ("conversation", "question", "input", "answer", "choices", "context", "system", "caption")
_TEXTS = frozenset(name for role in _TEXT_ROLES for name in ROLES[role]) | {"history", "dialog", "dialogue", "chat"}
_SPARE = {
    "image": ROLES["image"],
    "answer": (
        *ROLES["answer"], "rejected", "lecture", "explanation", "explanations", "rationale", "rationales", "reasoning",
    ),
    "caption": ("caption", "captions", "caption_str", "blip_caption", "comment", "reference_strs", "reference_tokens"),
}  # fmt: skip
_ASKED = {"conversation", "question", "caption"}  # roles of which a row has one
_MAKES_TEXT_A_QUESTION = ("question_id", "answer", "answers")  # LLaVA's question files; else `text` is a caption
_OTHER_MEDIA = ("video", "videos", "video_path", "video_file", "audio", "audios", "audio_path", "audio_file")
_DESCRIPTIVE = {
    "id", "ids", "idx", "index", "uid", "uuid", "guid", "pid", "qid", "key", "hash", "sha", "sha1", "sha256",
    "md5", "checksum", "no", "number", "num", "page", "rank",
    "url", "urls", "uri", "link", "path", "paths", "file", "files", "filename", "folder", "dir",
    "source", "sources", "origin", "dataset", "split", "set", "subset", "partition", "fold",
    "category", "categories", "type", "types", "class", "classes", "task", "tasks", "topic", "subject", "domain",
    "field", "subfield", "subcategory", "skill", "grade", "level",
    "difficulty", "capability", "license", "licence", "language", "lang", "locale", "country",
    "width", "height", "size", "shape", "resolution", "format", "mode", "date", "time", "timestamp", "year",
    "created", "modified",
    "version", "model", "author", "annotator", "worker", "photographer", "metadata", "meta", "info", "status",
    "flag", "score", "confidence", "weight", "imagesource", "semantic", "semantic_str",
    "bbox", "bboxes", "box", "boxes", "polygon", "segmentation", "coordinates",
    "set_name", "dataset_name", "ds_name", "model_name", "image_name",
}  # fmt: skip
_TELLING = re.compile(  # names of choices and images, such as option_1 and second_image
    r"(?:choice|option|candidate|distractor|alternative|answer)\w*|\w|(?:\w*_)?(?:image|img|picture|photo|mask)s?_?\w?"
)
_PLACES = {"path", "paths", "file", "files", "filename", "name", "url", "urls", "uri", "link"}  # of any image
_SINGLE_WORD = re.compile(r"[!-~]*")  # ASCII without blanks


def present(row: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of a row that hold something, without those to leave unread."""
    return {name: value for name, value in row.items() if not (name in ignored or _is_missing(value))}


def assign(names: Iterable[str], columns: Columns = ()) -> dict[str, str]:
    """Return which field is read in which role.

    Args:
        names: Names of the fields of a row or a table.
        columns: Roles given by the user. One of conversation, question and caption leaves no field to the others.
    """
    names, given = list(names), dict(columns)
    known = {normalise(name): name for name in names if name not in given.values()}
    settled = given.keys() | (_ASKED if given.keys() & _ASKED else ())
    roles = {}
    for role, aliases in ROLES.items():
        alias = next((alias for alias in aliases if alias in known), None)
        if alias and role not in settled:
            roles[role] = known[alias]
    if roles.get("input") == roles.get("question"):
        roles.pop("input", None)
    if "question" in roles and normalise(roles.get("conversation", "")) in _PAIRS:
        del roles["conversation"]
    is_caption = roles.keys().isdisjoint({"conversation", "question"}) and roles.get("caption") == known.get("text")
    if "caption" in roles and is_caption and not known.keys().isdisjoint(_MAKES_TEXT_A_QUESTION):
        roles["question"] = roles.pop("caption")
    return roles | {role: name for role, name in given.items() if name in names}


def lettered(names: Iterable[str]) -> dict[str, str]:
    """Return the fields that hold one choice each, by their letters: `A`, `B` or `option_a`, `choice_b`."""
    matches = ((re.fullmatch(r"(?:(?:choice|option)_?)?([a-j])", normalise(name)), name) for name in names)
    found = {match[1].upper(): name for match, name in matches if match}
    return found if {"A", "B"} <= found.keys() else {}


def numbered(names: Iterable[str]) -> list[str]:
    """Return the fields that hold one image each, `image_1`, `image_2` and so on, in the order of their numbers."""
    matches = ((re.fullmatch(r"(?:image|img)_?([1-9]\d?)", normalise(name)), name) for name in names)
    found = {int(match[1]): name for match, name in matches if match}
    return [found[number] for number in sorted(found)]


def image_fields(names: Iterable[str], columns: Columns = ()) -> list[str]:
    """Return the fields that images are read from: the one with that role, else those with numbers."""
    names = list(names)
    role = assign(names, columns).get("image")
    return numbered(names) if role is None else [role]


def mapping(names: Iterable[str], columns: Columns = ()) -> str:
    """Return in words which fields are read, of those that there are."""
    names = list(names)
    roles = assign(names, columns)
    answer = f"`{roles['answer']}`" if "answer" in roles else "no answer"
    if "conversation" in roles:
        text = f"`{roles['conversation']}` as conversation"
    elif "question" in roles:
        choices = [roles["choices"]] if "choices" in roles else list(lettered(names).values())
        of = f" with the choices {', '.join(f'`{name}`' for name in choices)}" if choices else ""
        text = f"`{roles['question']}`{of} and {answer}"
    else:
        text = f"stock prompts and `{roles['caption']}` as answer" if "caption" in roles else "stock prompts"
    images = ", ".join(f"`{name}`" for name in image_fields(names, columns)) or "no images"
    return f"{images}, {text}"


def asks(names: Iterable[str], columns: Columns = ()) -> bool:
    """Tell whether any of the fields is known to hold what an image is asked or described by."""
    return not assign(names, columns).keys().isdisjoint(_ASKED)


def known_names() -> str:
    """Return in words some of the names that text and images are read under."""
    some = {role: ROLES[role][:_NAMES_SHOWN] for role in (*_TEXT_ROLES, "image")}
    return "; ".join(
        f"{role}: {', '.join(names)}{', …' if len(names) < len(ROLES[role]) else ''}" for role, names in some.items()
    )


def validate_named(ignored: Collection[str], columns: Columns, names: Collection[str], data: str) -> None:
    """Check that the fields which the user names exist, those to leave unread and those with a role.

    Raises:
        DataError: if one does not; names it.
    """
    options = [(f"--ignore-fields {name}", name) for name in ignored]
    options += [(f"--columns {role}={name}", name) for role, name in columns]
    for option, name in options:
        if name not in names:
            raise DataError(f"{option}: {data} has the fields {', '.join(names)}.{did_you_mean(name, names)}")


def validate_columns(row: Fields, columns: Columns) -> None:
    """Check that a row has the fields that the user gave roles, be they empty.

    Raises:
        RowError: if it lacks one; names it.
    """
    for role, name in columns:
        if name not in row:
            known = ", ".join(f"`{each}`" for each in row) or "no fields"
            raise RowError("a row that lacks a column", f"no `{name}`, which --columns reads as {role}; it has {known}")


def validate_media(fields: Fields) -> None:
    """Check that a row is about images and text alone.

    Raises:
        RowError: if a field has a video or a sound; names it.
    """
    for name, value in fields.items():
        if normalise(name) in _OTHER_MEDIA and any(True for _ in leaves(value)):
            raise RowError("neither image nor text", f"`{name}` is not empty: only images and text are read")


def validate_all_read(fields: Fields, read: Collection[str], **found: bool) -> None:
    """Check that no text and no image of a row is left unread.

    Args:
        fields: the row's fields.
        read: names of the fields that were read.
        found: What was read, as keywords of `_unread`.

    Raises:
        RowError: if any is; names the fields.
    """
    if unread := _unread(fields, read, **found):
        of = f", of the fields {', '.join(fields)}" if len(fields) > len(unread) else ""
        raise RowError(UNREAD, f"{', '.join(f'`{name}`' for name in unread)}{of}")


def validate_object(value: Fields, read: Collection[str], what: str) -> None:
    """Check that an object inside of a row, such as a message, holds no text and no image but what is read.

    Raises:
        RowError: if it holds more; names the keys.
    """
    if unread := _unread(value, read, has_image=False, has_question=False, has_answer=False):
        keys = ", ".join(f"`{name}`" for name in unread)
        raise RowError(f"{what} with keys that are not read", f"{keys}, expected {', '.join(read)} alone")


def _unread(
    fields: Fields, read: Collection[str], *, has_image: bool, has_question: bool, has_answer: bool
) -> list[str]:
    """Return the names of the fields with text or images that are left unread.

    Args:
        fields: fields of a row, or of an object in it.
        read: names of the fields that were read.
        has_image: whether an image was read.
        has_question: whether a question was read, not only a caption.
        has_answer: whether an answer or a caption was read.
    """
    told = _SPARE["answer" if has_question else "caption"] if has_answer else ()
    spare = {*(_SPARE["image"] if has_image else ()), *told}
    seen = [leaf for name in read for leaf in leaves(fields.get(name))]
    paths = [leaf for leaf in seen if isinstance(leaf, str) and is_image(leaf)]

    def counts(name: str, value: Any) -> bool:
        held = list(leaves(value))
        if not all(isinstance(leaf, str) for leaf in held):  # bytes: an encoded image
            return True
        texts = [str(leaf) for leaf in held if not any(_is_same_file(str(leaf), path) for path in paths)]
        other_images = [text for text in texts if is_image(text)]
        if other_images and not has_image:
            return True
        if name in ROLES["answer"] and has_question != has_answer:  # whether a caption is right, what a chat has not
            return not is_blank(value)
        last_word = name.rpartition("_")[2]
        is_place = bool(paths) if name in ROLES["image"] else last_word in _PLACES and name not in spare
        if other_images and is_place and not any("://" in image for image in other_images):
            return all(isinstance(leaf, str) for leaf in seen)  # else it is where the bytes that were read come from
        if name in spare or name in _DESCRIPTIVE or last_word in _DESCRIPTIVE:
            return False
        is_telling = not has_answer or name in _TEXTS or _TELLING.fullmatch(name) or _holds_objects(value)
        return bool(other_images) or any(is_telling or not _SINGLE_WORD.fullmatch(text) for text in texts)

    return [name for name, value in fields.items() if name not in read and counts(normalise(name), value)]


def is_blank(value: Any) -> bool:
    """Tell whether a value says nothing, as empty cells do that pandas has written."""
    return _is_missing(value) or (isinstance(value, str) and value.strip().casefold() in ("", "nan"))


def leaves(value: Any) -> Iterator[str | bytes]:
    """Yield the texts and bytes in a value, at any depth, without blank ones."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, str | bytes) and value and not is_blank(value):
            yield value


def is_image(text: str) -> bool:
    """Tell whether a text ends as the path of an image does."""
    return PurePath(text).suffix.lower() in IMAGE_SUFFIXES


def _is_same_file(path: str, other: str) -> bool:
    """Tell whether two paths can name one file, seen from two folders."""
    one, two = (f"/{each}".replace("\\", "/") for each in (path, other))
    return one.endswith(two) or two.endswith(one)


def _holds_objects(value: Any) -> bool:
    """Tell whether a value is a list of lists or objects, as turns are stored."""
    return isinstance(value, list) and any(isinstance(each, list | dict) for each in value)


def _is_missing(value: Any) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, float) and math.isnan(value))


def normalise(name: str) -> str:
    """Return a name in lower case with underscores, as `question_id` for `questionId`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s.-]+", "_", name).casefold()
