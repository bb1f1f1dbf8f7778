"""What every section of a recipe is: strict and frozen; and its faults in words. No torch."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from dpn_cli.errors import did_you_mean


class Section(BaseModel):
    """A mapping of known keys to values of the right types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def faults(error: ValidationError, root: type[BaseModel]) -> str:
    """Return what pydantic found in a section as one clause per key; the branches of a union are joined by `or`."""
    by_path: dict[str, list[str]] = {}
    found = error.errors()
    for detail in found:
        inside = [other for other in found if other["loc"][: len(detail["loc"])] == detail["loc"]]
        if detail["type"] == "too_short" and len(inside) > 1:  # an item that has a fault is not counted
            continue
        section, path = _locate(detail["loc"], root)
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            known = section.model_fields
            message = "unknown key." + (did_you_mean(str(detail["loc"][-1]), known) or f" Known: {', '.join(known)}")
        by_path.setdefault(path, []).append(message)
    return "; ".join(f"{path}: {' or '.join(messages)}" for path, messages in by_path.items())


def _locate(loc: tuple[int | str, ...], section: type[BaseModel]) -> tuple[type[BaseModel], str]:
    """Return the section that a fault is in, and its key path without pydantic's names of union branches."""
    path: list[str] = []
    in_leaf = False
    for part in loc:
        if in_leaf and isinstance(part, str):
            continue
        path.append(str(part))
        if isinstance(part, str):
            field = section.model_fields.get(part)
            nested = next(_sections_in(field.annotation), None) if field else None
            section, in_leaf = nested or section, nested is None
    return section, ".".join(path) or "the recipe"


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)
