"""A terminal that is recorded shows what a user sees, and says when it was silent and where a word was cut."""

from importlib import import_module
from typing import Any

import pytest

from benchmarks.evidence import HERE
from benchmarks.terminal import Screen


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(HERE)  # as of a script
    return import_module("benchmarks.recording")


@pytest.mark.parametrize(
    ("written", "rows"),
    [
        ("one\r\ntwo\r\n", ["one", "two", ""]),
        ("\x1b[1mbold\x1b[0m \x1b[38;5;1m红\x1b[m", ["bold 红"]),
        ("loading ━━ 0:01\r\x1b[2Kdone", ["done"]),
        ("a\r\nb\r\n\x1b[2A\x1b[2Kc\r\n", ["c", "b", ""]),
        ("1234567890123456789012", ["12345678901234567890", "12"]),
        ("first\r\x1b]0;title\x07F", ["First"]),
    ],
)
def test_a_screen_shows_what_a_terminal_would(written: str, rows: list[str]) -> None:
    screen = Screen(20, 4)
    rest = ""
    for character in written:  # as it may come in pieces
        rest = screen.write(rest + character)
    assert (screen.rows, rest) == (rows, "")


def test_the_cursor_does_not_reach_what_has_scrolled_away() -> None:
    screen = Screen(20, 2)
    assert screen.write("one\r\ntwo\r\nthree\x1b[9A\r\x1b[2K2\x1b[") == "\x1b["
    assert screen.rows == ["one", "2", "three"]
    with pytest.raises(ValueError, match="unknown control sequence 4H"):
        screen.write("\x1b[4H")


def test_words_that_the_width_cuts_are_found() -> None:
    screen = Screen(10, 4)
    screen.write("ten of it \r\nand eleven\r\nmore than ten\r\n")
    assert screen.rows[2:4] == ["more than", "ten"] and not screen.cut
    screen.write("it is uncut so far")
    assert screen.rows[4:] == ["it is uncu", "t so far"] and screen.cut == {4}


def test_the_longest_silence_is_found_and_lines_that_are_replaced_are_kept(
    recording: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(recording.time, "monotonic", lambda: now)
    seen = recording.Recording(Screen(40, 4), now)
    moments = [(101.0, "loading the model  0:00"), (104.0, "\rloading the model  0:03"), (105.0, "\r\x1b[2Kdone\r\n")]
    for at, written in [*moments, (105.5, "")]:
        now = at
        seen.screen.write(written)
        seen.look()
    now = 106.0
    seen.look(at_end=True)
    assert seen.silence == (3.0, 1.0)
    assert seen.lines() == ["   1.0 ~ loading the model  0:03", "   5.0 | done"]


def test_a_command_runs_in_a_terminal_of_the_size(recording: Any) -> None:
    widths = []
    for columns in (80, 100):
        seen, code = recording.record("dpn recipes", columns, 24)
        assert code == 0 and not seen.screen.cut and seen.silence[0] > 0
        assert any("dpn convert MODEL --recipe NAME takes" in row for row in seen.screen.rows)
        widths.append(max(map(len, seen.screen.rows)))
    assert widths[0] <= 80 < widths[1] <= 100
    assert recording.record("dpn recipes nothing", 80, 24)[1] == 2
