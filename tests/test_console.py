import json
import os
import re
import unicodedata

import pytest
from rich.console import Console

from dpn_cli import console


@pytest.fixture(autouse=True)
def _loud() -> None:
    console.set_quiet(False)


def test_tables_go_to_stdout_whole_and_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("A title [not markup]", ["name", "value"], [["x" * 90, 1.5], ["[red]", "y" * 60]])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "A title [not markup]" in captured.out
    assert "x" * 90 in captured.out
    assert "[red]" in captured.out
    assert "y" * 60 in captured.out


TRAPS = {
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "C1": "\x9d52;c;eA==\x9c",
    "back to the start": "fine\rError",
    "turned round": "safe\u202egpj.exe\u2066\u200f\u061c",
    "half a character": os.fsdecode(b"\xff"),
    "deleted": "abc\x7f\x08",
    "ends of lines": "one\u2028two\x85three\x0bfour",
}


def is_harmless(text: str) -> bool:
    """Say whether no character is a control character or one that turns the direction of text."""
    turned = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return all(
        character in "\n\t"
        or (unicodedata.category(character) != "Cc" and unicodedata.bidirectional(character) not in turned)
        for character in text
    )


@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_a_terminal_is_told_nothing(capsys: pytest.CaptureFixture[str], trap: str) -> None:
    console.note(f"reading {trap}")
    console.table(trap, ["name", trap], [[trap, f"[red]{trap}"]])
    with console.progress(trap, total=1) as advance:
        advance(1)
    console.echo(trap, err=True)
    captured = capsys.readouterr()
    assert is_harmless(captured.out) and is_harmless(captured.err)
    shown = json.dumps(trap).strip('"').replace("\\b", "\\u0008").replace("\\r", "\\u000d")
    assert captured.out.count(shown) == 4 and captured.err.count(shown) == 3


@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_json_says_the_same_to_a_program_and_nothing_to_a_terminal(
    capsys: pytest.CaptureFixture[str], trap: str
) -> None:
    console.echo(json.dumps({"é": trap}, indent=2, ensure_ascii=False))
    out = capsys.readouterr().out
    assert is_harmless(out) and "é" in out
    assert json.loads(out) == {"é": trap}


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[red]stop[/red] :smile: [link=x]", "two\nlines", "日本語 👩‍🚀 é"):
        console.note(text)
        console.echo(text)
        captured = capsys.readouterr()
        assert captured.err == captured.out == f"{text}\n"
    console.echo("a\ttab", nl=False)
    assert capsys.readouterr().out == "a\ttab"


def test_off_a_terminal_progress_is_a_plain_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("counting", total=300) as advance:
        for _ in range(100):
            advance(3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("counting: 300/300, done")


def test_bytes_are_counted_in_units_that_a_reader_knows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.copying("writing", 14_100_000_000) as advance:
        advance(14_100_000_000)
    assert capsys.readouterr().err.startswith("writing: 14.1 GB/14.1 GB, done")
    monkeypatch.setattr(console, "_stderr", Console(stderr=True, force_terminal=True, width=100))
    with console.waiting("converting"), console.copying("writing", 14_100_000_000) as advance:
        advance(4_300_000_000)
    assert "4.3/14.1 GB" in capsys.readouterr().err


def test_plain_progress_says_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 20.0, 24.0, 0.0, 11.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("counting", total=100) as advance:
        advance(10)
        advance(30)
        advance(10)
    assert capsys.readouterr().err == "counting: 40/100, 2/s, 0:30 left\n"
    with console.progress("counting", total=100) as advance:
        advance(0)
    assert capsys.readouterr().err == "counting: 0/100\n"


def test_on_a_terminal_progress_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_stderr", Console(stderr=True, force_terminal=True, width=100))
    with console.progress("[red]\x1b]52;c;eA==\x07", total=30) as advance:
        advance(30)
    shown = capsys.readouterr().err
    assert "30/30" in shown
    assert "[red]\\u001b]52;c;eA==\\u0007" in shown and "\x1b]52" not in shown


@pytest.mark.parametrize("batch_s", [0.5, 40.0, 4000.0])
def test_the_time_left_is_shown_from_the_second_batch_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, batch_s: float
) -> None:
    terminal = Console(stderr=True, force_terminal=True, width=80, highlight=False)
    now = 0.0
    terminal.get_time = lambda: now  # type: ignore[method-assign]
    monkeypatch.setattr(console, "_stderr", terminal)
    with console.progress("measuring", total=10) as advance:
        for batch in range(3):
            now += batch_s
            advance(1)
            capsys.readouterr()
            terminal._live_stack[-1].refresh()
            shown = capsys.readouterr().err
            assert (" left" in shown) is (batch > 0), shown
            assert (f"{1 / batch_s:.0f}/s" if batch_s < 1 else f"{batch_s:.1f} s each") in shown or batch == 0
        assert f"{console._clock(7 * batch_s)} left" in shown or batch_s < 1
        now += 4.0  # within the next batch
        terminal._live_stack[-1].refresh()
        left = 7 * batch_s - 4.0
        shown = capsys.readouterr().err
        assert f"{console._clock(left)} left" in shown if left > 0 else " left" not in shown, "it goes on"
        advance(7)


def test_waiting_says_what_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with console.waiting("loading the model"):
        assert capsys.readouterr().err == "", "nobody watches"
    monkeypatch.setattr(console, "_stderr", Console(stderr=True, force_terminal=True, width=80, highlight=False))
    with console.waiting("loading the model"):
        pass
    assert "loading the model" in (shown := capsys.readouterr().err) and "0:00" in shown


def test_times_are_read_at_a_glance() -> None:
    assert [console._clock(s) for s in (0, 7.9, 754, 3723)] == ["0:00", "0:07", "12:34", "1:02:03"]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(True)
    try:
        console.note("hello")
        with console.progress("counting", total=1) as advance:
            advance(1)
    finally:
        console.set_quiet(False)
    assert capsys.readouterr().err == ""


def test_a_number_is_never_cut_and_words_break_at_blanks_and_commas(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    route = ",".join(["attended:0.25+2x2"] * 5)
    rows = [[f"a method of some length {i}", f"0.{i:030}", route] for i in range(3)]
    for width in (80, 70, 30):
        monkeypatch.setattr(console, "PLAIN_WIDTH", width)
        console.table(
            "title", ["method", "a long name of a number", "route"], rows, texts=["route"], legend="so it is " * 9
        )
        lines = capsys.readouterr().out.splitlines()
        assert width == 30 or max(map(len, lines)) <= width
        words = re.split(r"[\s,]+", " ".join(lines))
        assert words.count("attended:0.25+2x2") == 15 and "length" in words
        assert sum(row[1] in words for row in rows) == 3


def test_messages_break_at_words_on_a_terminal_and_nowhere_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "one of keep, pool:1x2, diverse:0.5, attended:0.25, covering:0.15 and " * 3 + "/a/very/long/path" * 9
    for say in (console.note, console.error):
        say(words)
        assert capsys.readouterr().err == f"{words}\n"
    terminal = Console(stderr=True, force_terminal=True, width=80, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "_stderr", terminal)
    for say in (console.note, console.error):
        say(f"  {words}")
        *lines, path, end = capsys.readouterr().err.split("\n")
        assert max(map(len, lines)) <= 80 and all(line.startswith("  ") for line in lines) and not end
        assert " ".join([*lines, path]).split() == words.split(), "no word is cut, a path neither"
    for length in range(60, 80):
        console.note(f"{'x' * length} 2 tokens in 0.25 s, 4 MB")
        said = capsys.readouterr().err
        assert "0.25 s," in said and "4 MB" in said, "a number keeps its unit"
