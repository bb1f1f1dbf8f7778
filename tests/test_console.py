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


def test_off_a_terminal_progress_is_a_plain_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("counting", total=300) as advance:
        for _ in range(100):
            advance(3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("counting: 300/300, ")


def test_plain_progress_says_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 4.0, 20.0, 24.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("counting", total=100) as advance:
        advance(10)
        advance(30)
        advance(10)
    assert capsys.readouterr().err == "counting: 40/100, 2/s, 30 s left\n"


def test_on_a_terminal_progress_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_stderr", Console(stderr=True, force_terminal=True, width=100))
    with console.progress("counting", total=30) as advance:
        advance(30)
    assert "30/30" in capsys.readouterr().err


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(True)
    try:
        console.note("hello")
        with console.progress("counting", total=1) as advance:
            advance(1)
    finally:
        console.set_quiet(False)
    assert capsys.readouterr().err == ""
