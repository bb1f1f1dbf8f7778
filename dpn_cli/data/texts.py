"""Texts as rows hold them: checked, stripped, and with their image placeholders counted."""

import ast
import json
import re
import tokenize
from collections import Counter
from contextlib import suppress
from io import StringIO
from itertools import pairwise
from typing import Any

from dpn_cli.data.faults import RowError

PLACEHOLDER = "<image>"
_NUMBERED = re.compile(r"<image (\d{1,2})>")  # as in MMMU
_ALONE = re.compile(rf"^{_NUMBERED.pattern}\s*|\s*{_NUMBERED.pattern}$")
_BESIDE = re.compile(rf"^(?:{_NUMBERED.pattern}\s*)+(?=[A-Z])|(?<=[.?!:])\s*(?:{_NUMBERED.pattern}\s*)+$")
_LIST = re.compile(r"""\s*\[\s*(['"].*['"]|\{.*\})\s*\]\s*""", re.DOTALL)  # of quoted texts, or of objects
_OTHER_MEDIA = ("<video>", "<audio>")
_OTHER_MARKERS = re.compile(  # of images, such as <image 1>, <|image_pad|>, <ImageHere>, <img> and [IMG]
    rf"(?!(?-i:{PLACEHOLDER}))<\|?/?(?:image|img|im_patch|vision_|start_of_image)[\w -]*\|?/?>|\[img[\w -]*\]",
    re.IGNORECASE,
)


def read_text(value: Any, what: str) -> str:
    """Return a text without the space around it.

    Args:
        value: a value from a row.
        what: Name of the text in messages.

    Raises:
        RowError: if it is no text, or one that cannot be encoded.
    """
    if not isinstance(value, str):
        raise RowError("no text", f"expected text for the {what}, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError("broken text", f"the {what} contains an unpaired surrogate, which UTF-8 cannot hold") from None
    return value.strip()


def count_images(question: str) -> int:
    """Return how many images a question shows.

    Raises:
        RowError: if it shows something else, or an image by another marker.
    """
    if other := next((each for each in _OTHER_MEDIA if each in question), None):
        raise RowError("neither image nor text", f"{other}: only images and text are read")
    if marker := _OTHER_MARKERS.search(question):
        raise RowError("an unknown image marker", f"{marker[0]}: an image is shown by {PLACEHOLDER} in a question")
    return question.count(PLACEHOLDER)


def image_numbers(text: str) -> list[int]:
    """Return the numbers of a text's numbered placeholders."""
    return [int(number) for number in _NUMBERED.findall(text)]


def name_images(text: str) -> str:
    """Return a text with words for numbered placeholders."""
    return _NUMBERED.sub(r"image \1", text)


def name_images_asked(question: str) -> str:
    """Return a question with words for numbered placeholders; those that only show an image, at either end, go."""
    alone = len(image_numbers(question)) == 1
    return name_images((_ALONE if alone else _BESIDE).sub("", question))


def read_text_alone(value: Any, what: str) -> str:
    """Return a text that shows no image, without the space around it.

    Raises:
        RowError: as `read_text` and `count_images`, or if it shows one.
    """
    text = read_text(value, what)
    if count_images(text):
        raise RowError(f"{PLACEHOLDER} outside of a question", f"{PLACEHOLDER} in the {what}")
    return text


def without_images(question: str) -> str:
    """Return a question without its placeholders, and without a second blank where one stood between two."""
    return re.sub(rf"(?<= ){PLACEHOLDER} |{PLACEHOLDER}", "", question).strip()


def read_answer(value: Any) -> str:
    """Return an answer, or of several people's answers, as VQAv2 has them, the most frequent one.

    Letter case does not make answers different.

    Raises:
        RowError: if there is none, or several numbers are rather one answer, a box, than what several people counted.
    """
    found = read_list(value)
    if not isinstance(found, list) or not found:
        return read_plain_answer(value)
    if isinstance(value, str) and any(isinstance(each, dict) and "answer" not in each for each in found):
        return read_plain_answer(value)  # these objects are the answer, such as boxes and their labels
    answers = [_plain(each.get("answer", each.get("text")) if isinstance(each, dict) else each) for each in found]
    [(agreed, votes)] = Counter(map(str.casefold, answers)).most_common(1)
    [(answer, _)] = Counter(each for each in answers if each.casefold() == agreed).most_common(1)
    if all(isinstance(each, int | float) for each in found) and 2 * votes <= len(found):
        raise RowError("an answer of several numbers", f"{found}: if they are one answer, write it as text")
    return read_plain_answer(answer)


def read_plain_answer(value: Any) -> str:
    """Return the answer that a text or a number is.

    Raises:
        RowError: if it is neither, or empty.
    """
    text = _plain(value)
    if not text:
        raise RowError("an empty answer")
    return read_text_alone(text, "answer")


def read_list(value: Any) -> Any:
    """Return the list that a value is, or of texts or objects spells out, as cells hold it; other values as they are.

    Raises:
        RowError: as `records`.
    """
    return records(spelt_out(value) if isinstance(value, str) and _LIST.fullmatch(value) else value)


def spelt_out(value: Any) -> Any:
    """Return the list or object that a text spells out; other values as they are.

    It may be written in JSON, in Python, as MMMU stores options and answers, or as numpy prints arrays, without commas.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{", "("):
        for read in (json.loads, _literal):
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
                return read(value)
    return value


def _literal(text: str) -> Any:
    """Return the value that a text is in Python, or would be with commas between its items."""
    tokens = [token for token in tokenize.generate_tokens(StringIO(text.strip()).readline) if token.string.strip()]
    words = [tokens[0].string]
    for before, after in pairwise(tokens):
        words += [","] if _is_item(before, "]}") and _is_item(after, "[{") else []
        words.append(after.string)
    return ast.literal_eval(" ".join(words))


def _is_item(token: tokenize.TokenInfo, brackets: str) -> bool:
    """Say whether a token is an item of a list, or the bracket on one side of it."""
    return token.type in (tokenize.STRING, tokenize.NUMBER) or token.string in brackets


def records(value: Any) -> Any:
    """Return a list of objects where a table holds one object of lists, as `datasets` stores a Sequence of structs.

    Raises:
        RowError: if the lists differ in length.
    """
    if not isinstance(value, dict):
        return value
    columns = {key: column for key, column in value.items() if column is not None}
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        return value
    if len({len(column) for column in columns.values()}) > 1:
        raise RowError("lists of different lengths", f"expected as many items in each of {', '.join(columns)}")
    return [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> str:
    return read_text(str(value) if isinstance(value, int | float) else value, "answer")
