from typing import Any

import pytest

from dpn_cli.errors import RecipeError
from dpn_cli.pyramid.strict_yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("", None),
        ("~", None),
        ("{on: no}", {"on": "no"}),
        ("'1'", "1"),
        ("1_000", "1_000"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    result = parse_yaml(text, where="test")
    assert result == value
    assert type(result) is type(value)


def test_a_key_may_appear_once() -> None:
    with pytest.raises(RecipeError, match=r"test, line 3: the key 'a' appears twice"):
        parse_yaml("a: 1\nb: 2\na: 3\n", where="test")


@pytest.mark.parametrize("text", ["!!python/object:os.system {}", "{[1]: 2}", "a: *b", "\xff\x00"])
def test_unsafe_or_broken_documents_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="test"):
        parse_yaml(text, where="test")
