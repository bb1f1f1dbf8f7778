"""Which key of a JSON file is to blame: the one without which all is well. No torch."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

MAX_KEYS = 200  # of an object whose keys are tried: more are a vocabulary's

Key = tuple[str, ...]


def keys(data: Mapping[str, Any], before: Key = ()) -> Iterator[Key]:
    """Yield the keys of a JSON object, those of objects in it first."""
    for key, value in data.items() if len(data) <= MAX_KEYS else ():
        if isinstance(value, dict):
            yield from keys(value, (*before, key))
        yield (*before, key)


def without(data: dict[str, Any], key: Key) -> tuple[dict[str, Any], Any]:
    """Return a copy of a JSON object without a key, and the value of that key."""
    rest = inner = deepcopy(data)
    for each in key[:-1]:
        inner = inner[each]
    value = inner.pop(key[-1])
    return rest, value
