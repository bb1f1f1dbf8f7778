"""Which field answers a question, where a row has several that could.

Sources: preferences of TRL, https://huggingface.co/docs/trl/dataset_formats, and of LLaMA-Factory, which mark an answer
as a good or a bad one; files of results, which have the truth beside what a model has said.
"""

from typing import Any

from dpn_cli.data.faults import RowError
from dpn_cli.data.fields import ROLES, Fields, leaves, normalise

_SAID = ("response", "output", "completion", "chosen")  # by a model or a person, right or wrong
_EXPLAINED = ("solution", "full_answer")  # the same at length
_VERDICTS = ("label", "kto_tag")  # whether what was said is good, where they are truth values


def settle_answer(fields: Fields, roles: dict[str, str]) -> dict[str, str]:
    """Return which field is read in which role, where the answer may be marked, or stand beside another one.

    Args:
        fields: the row's fields.
        roles: as `assign` has found them, without a field for the answer that the user names.

    Raises:
        RowError: if the answer is marked as a bad one, or two fields answer differently.
    """
    answers = {normalise(name): name for name in fields if normalise(name) in ROLES["answer"]}
    said = next((answers[name] for name in _SAID if name in answers), None)
    for name, value in fields.items():
        if normalise(name) in _VERDICTS and value is False and (said or "conversation" in roles):
            raise RowError(
                "an answer that is marked as bad",
                f"`{name}` is false; --on-bad-row skip leaves such rows out, --ignore-fields {name} reads them",
            )
    if said is None or "conversation" in roles:
        return roles
    others = [name for alias, name in answers.items() if alias not in (*_SAID, *_EXPLAINED)]
    others = [name for name in others if not isinstance(fields[name], bool)]
    for other in others:
        if _said_in(fields[other]).isdisjoint(_said_in(fields[said])):
            raise RowError(
                "two answers", f"`{other}` and `{said}` differ: --columns answer={other} (or {said}) says which to read"
            )
    return roles if others else roles | {"answer": said}


def _said_in(value: Any) -> set[str]:
    """Return the texts in a value, or what it is as a text."""
    return {str(each).strip().casefold() for each in [*leaves(value)] or [value]}
