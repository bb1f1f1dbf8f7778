"""YAML without its traps: 1e-5 is a number, `on` and `no` are words, a key may appear once."""

import math
import re
from collections.abc import Hashable, Iterable
from itertools import chain
from typing import Any

import yaml

from dpn_cli.errors import RecipeError
from dpn_cli.limits import MAX_YAML_BYTES, MAX_YAML_VALUES


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema and without duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not a word", node.start_mark)
            if key in keys[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+.0123456789"),
):  # fmt: skip
    _firsts = [*_first, ""] if _tag == "null" else list(_first)
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _firsts)

_StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))  # 010 is ten, not eight


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Read plain data from YAML.

    Args:
        text: the YAML document.
        where: names the document in errors.

    Raises:
        RecipeError: with the place of the fault, or if it is larger than plain data of its kind can be.
    """
    if len(text) > MAX_YAML_BYTES:
        raise RecipeError(f"{where} has more than {MAX_YAML_BYTES:,} bytes")
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if _num_values(node, {}) > MAX_YAML_VALUES:
            raise RecipeError(f"{where} has more than {MAX_YAML_VALUES:,} values, with its aliases written out")
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: not YAML ({' '.join(str(error).split())})") from None


def _num_values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Return how many values a node stands for; `known` are those of other nodes, by identity."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known: what holds itself has no end
        children: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            children = chain.from_iterable(node.value)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_num_values(child, known) for child in children)
    return known[id(node)]
