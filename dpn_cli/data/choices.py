"""Multiple choice: the choices as lettered lines of the question, the right one as its letter."""

import re
from collections.abc import Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

from dpn_cli.data.faults import RowError
from dpn_cli.data.fields import Fields, is_blank, is_image, lettered
from dpn_cli.data.texts import name_images, read_text_alone, records, spelt_out

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""The words that LLaVA-1.5 was trained with. Source: Liu et al. 2023, https://arxiv.org/abs/2310.03744."""

_LETTERED = re.compile(r"^\(?([A-Z])(?:[):]\s*|\.(?:\s+|$)|$)", re.IGNORECASE)  # not that of "A.D." or "a.png"


def read_choices(fields: Fields, field: str | None) -> tuple[list[Any], tuple[str, ...]]:
    """Return the choices of a row in the order of their letters, and the names of the fields that hold them.

    Args:
        fields: the row's fields.
        field: the field with all choices, as a list or as an object by letters; None if each may stand in a field of
            its own.

    Raises:
        RowError: if they cannot be told apart, or are no texts.
    """
    names = (field,) if field is not None else tuple(lettered(fields).values())
    value = spelt_out(fields[field]) if field is not None else {k: fields[v] for k, v in lettered(fields).items()}
    value = records(value)
    if isinstance(value, list) and all(isinstance(each, dict) and each.keys() == {"label", "text"} for each in value):
        value = {each["label"]: each["text"] for each in value}  # as in ARC
    if isinstance(value, dict):
        given = {str(letter).upper(): choice for letter, choice in value.items() if not is_blank(choice)}
        if sorted(given) != list(LETTERS[: len(given)]):
            raise RowError("unknown choices", f"choices {', '.join(given)}, expected A, B and so on without a gap")
        value = [given[letter] for letter in sorted(given)]
    if not isinstance(value, list) or len(value) > len(LETTERS):
        raise RowError("unknown choices", f"expected a list of choices or an object by letters, found {value!r:.80}")
    texts = [_text(choice) for choice in value]
    if texts and all(map(is_image, texts)):
        raise RowError("choices that are images", f"{texts[0]:.40} and so on; expected texts")
    bare = [_bare(text) for text in texts]
    if all(bare) and [_letter(text) for text in texts] == list(LETTERS[: len(texts)]):  # they bring their letters
        value = texts = bare
    if not all(texts):
        raise RowError("unknown choices", "a choice is empty")
    return value, names


def ask_for_letter(question: str, choices: Sequence[Any]) -> str:
    """Return a question with its choices as lettered lines, if it does not list them itself.

    Raises:
        RowError: if it lists them in another order.
    """
    texts = {letter: _text(choice) for letter, choice in zip(LETTERS, choices, strict=False)}
    listed = {letter: _letters_before(text, question) for letter, text in texts.items()}
    is_listed = all(letter in found for letter, found in listed.items())
    if not is_listed and all(listed.values()):
        raise RowError("choices in another order", "the question lists them with other letters than their own")
    lines = [] if is_listed else [f"{letter}. {text}" for letter, text in texts.items()]
    return "\n".join([question.removesuffix(INSTRUCTION).rstrip(), *lines, INSTRUCTION])


def _letters_before(text: str, question: str) -> list[str]:
    """Return the letters that a question lists a choice under."""
    return re.findall(rf"(?<!\w)([A-Z])[).:]\s*{re.escape(text)}(?!\w)", question)


def answer_letter(answer: Any, choices: Sequence[Any]) -> str:
    """Return the letter of the right choice.

    Args:
        answer: the right choice: its place, counted from 0, as a number or in digits; its letter; or its text.
        choices: the choices, in the order of their letters.

    Raises:
        RowError: if that names none of them, or one in one way and another in another.
    """
    [answer] = answer if isinstance(answer, list) and len(answer) == 1 else [answer]
    is_place = isinstance(answer, int) and not isinstance(answer, bool)
    text = str(answer).strip()
    named = set()
    for i, choice in enumerate(choices):
        is_choice = choice == answer or (_text(choice) == text and not is_place)
        is_letter = LETTERS[i] == _letter(text) and _bare(text) in ("", _text(choice))
        if is_choice or is_letter or text in (str(i), f"{i}.0"):
            named.add(i)
    named = named or {i for i, choice in enumerate(choices) if _text(choice).casefold() == text.casefold()}
    if len(named) != 1:
        reason = "an ambiguous answer" if named else "an answer that is none of the choices"
        shown = ", ".join(f"{letter}. {_text(each):.20}" for letter, each in zip(LETTERS, choices, strict=False))
        raise RowError(reason, f"{answer!r:.50} for {shown}; expected a letter, a choice or its number from 0")
    return LETTERS[named.pop()]


def _letter(text: str) -> str | None:
    match = _LETTERED.match(text)
    return match[1].upper() if match else None


def _bare(text: str) -> str:
    return _LETTERED.sub("", text, count=1)


def _text(choice: Any) -> str:
    choice = str(choice) if isinstance(choice, int | float) else choice
    return read_text_alone(name_images(choice) if isinstance(choice, str) else choice, "choice")
