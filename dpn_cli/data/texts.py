"""Texts as rows hold them: checked, stripped, and with their image placeholders counted."""

from collections import Counter
from typing import Any

from dpn_cli.data.faults import RowError

PLACEHOLDER = "<image>"
_OTHER_PLACEHOLDERS = ("<video>", "<audio>")


def read_text(value: Any, what: str) -> str:
    """Return a text without the space around it.

    Args:
        value: of a row.
        what: it is, for messages.

    Raises:
        RowError: if it is no text, or one that cannot be encoded.
    """
    if not isinstance(value, str):
        raise RowError("no text", f"expected text for the {what}, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError("broken text", f"the {what} holds half of a surrogate pair") from None
    return value.strip()


def count_images(question: str) -> int:
    """Return how many images a question shows.

    Raises:
        RowError: if it shows something else.
    """
    if other := next((each for each in _OTHER_PLACEHOLDERS if each in question), None):
        raise RowError("neither image nor text", f"{other} in a question: only images and text are read")
    return question.count(PLACEHOLDER)


def without_images(question: str) -> str:
    """Return a question without its placeholders."""
    return question.replace(PLACEHOLDER, "").strip()


def read_answer(value: Any) -> str:
    """Return an answer, or of several people's answers, as VQAv2 has them, the most frequent one.

    Raises:
        RowError: if there is none.
    """
    value = records(value)
    if isinstance(value, list) and value:
        answers = [_plain(each.get("answer") if isinstance(each, dict) else each) for each in value]
        return read_answer(Counter(answers).most_common(1)[0][0])
    text = _plain(value)
    if not text:
        raise RowError("an empty answer")
    if PLACEHOLDER in text:
        raise RowError(f"{PLACEHOLDER} outside of a question", f"{PLACEHOLDER} in an answer")
    return text


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
        raise RowError("lists of unlike length", f"expected as many of each: {', '.join(columns)}")
    return [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> str:
    return read_text(str(value) if isinstance(value, int | float) else value, "answer")
