"""Metrics on known values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpn_cli.data.metrics import anls, chosen_letter, edit_distance, exact_match, multiple_choice, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat.", "cat"),
        (" Two  dogs ", "2 dogs"),
        ("1,000", "1000"),
        ("1.5", "1.5"),
        ("Don't", "dont"),
        ("black-and-white", "black and white"),
        ("red, green", "red green"),
        ("None", "0"),
        ("A", "a"),
        ("U.S.A.", "usa"),
        ("yes!", "yes"),
    ],
)
def test_normalise_as_vqa_does(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "label", "score"),
    [("a cat", "Cat.", 1), ("three", "3", 1), ("B", "A", 0), ("A", "the", 0), ("", "cat", 0), ("dont", "don’t", 1),
     ("+", "-", 0), ("❤", "☀", 0), ("?", "!!", 0), ("-5", "5", 0), ("-5.", "-5", 1), ("-0.5", "0.5", 0),
     ("का", "कि", 0), ("e\u0301te\u0301", "été", 1), ("t-shirt", "T shirt", 1),
     ("5-3", "5 3", 1), ("(red)", "red", 1), ("", "?", 0)],
)  # fmt: skip
def test_exact_match(answer: str, label: str, score: float) -> None:
    assert exact_match(answer, label) == score


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(c)", "C"),
        ("D. a cat", "D"),
        ("A: because", "A"),
        ("The answer is B.", "B"),
        ("The correct option is (C), a dog", "C"),
        ("I think it is (D)", "D"),
        ("**B**", "B"),
        ("Answer: **B**", "B"),
        ("Option: I don't know", None),
        ("The answer is I", "I"),
        ("a cat", None),
        ("the answer is a cat", None),
        ("", None),
    ],
)
def test_chosen_letter(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_multiple_choice() -> None:
    assert multiple_choice("The answer is B", "B. a cat") == 1
    assert multiple_choice("C", "B") == multiple_choice("no idea", "B") == multiple_choice("no idea", "none") == 0


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("flaw", "lawn", 2), ("intention", "execution", 5)],
)
def test_edit_distance_known_values(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


@given(st.text("ab", max_size=6), st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_anls() -> None:
    assert anls("Coca  Cola", "coca cola") == 1
    assert anls("coca colla", "coca cola") == pytest.approx(0.9)
    assert anls("ab", "ac") == 0, "a distance of one half does not count"
    assert anls("", "") == 1
