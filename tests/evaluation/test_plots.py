"""Pictures: what they hold, their formats, and that they come whole or not at all."""

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from dpn_cli.errors import MissingExtraError, UsageError
from dpn_cli.evaluation import plots
from dpn_cli.evaluation.plots import Point, Series, check_plot

SERIES = [
    Series("dpn", [Point(0.5, 0.01, y_interval=(0.008, 0.013)), Point(0.36, 0.1, y_interval=(0.05, 0.2))]),
    Series("fastv", [Point(0.5, 0.3)]),
]
DRAW: dict[str, Callable[[Path], None]] = {
    "frontier": lambda path: plots.plot_frontier(path, SERIES, "KL, nats", log=True),
    "flops": lambda path: plots.plot_latency_flops(path, {"batch of 1": SERIES, "batch of 4": SERIES}),
    "fidelity": lambda path: plots.plot_latency_fidelity(path, {"batch of 1": SERIES}, "KL, nats"),
}


@pytest.mark.parametrize("kind", DRAW)
def test_a_picture_names_every_method_and_is_the_same_when_drawn_again(kind: str, tmp_path: Path) -> None:
    DRAW[kind](tmp_path / "first.svg")
    DRAW[kind](tmp_path / "again.svg")
    text = (tmp_path / "first.svg").read_text()
    assert ">dpn<" in text
    assert ">fastv<" in text
    assert text == (tmp_path / "again.svg").read_text()


def test_the_suffix_says_the_format(tmp_path: Path) -> None:
    for suffix, magic in ((".png", b"\x89PNG"), (".PDF", b"%PDF")):
        DRAW["frontier"](tmp_path / f"picture{suffix}")
        assert (tmp_path / f"picture{suffix}").read_bytes().startswith(magic)


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fail(self: Any, file: Path, **kwargs: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "picture.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        DRAW["frontier"](tmp_path / "picture.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_methods_look_unlike_each_other_in_more_than_colour() -> None:
    styles = list(islice(plots._styles(), 12))
    assert len({(style["marker"], str(style["linestyle"])) for style in styles}) == 12


def test_an_interval_becomes_distances_that_are_never_negative() -> None:
    below, above = plots._error([1.0, 2.0, 3.0], [(0.5, 2.0), None, (3.0000001, 4.0)]) or ([], [])
    assert below == [0.5, 0.0, 0.0]
    assert above == [1.0, 0.0, 1.0]
    assert plots._error([1.0], [None]) is None


def test_what_cannot_be_drawn_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        check_plot(tmp_path / "picture.jpg")
    with pytest.raises(UsageError, match="does not exist"):
        check_plot(tmp_path / "nowhere" / "picture.png")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--plot loop/picture\.png: Too many"):
        check_plot(Path("loop/picture.png"))
    with pytest.raises(UsageError, match=r"--plot x{40}…: File name too long"):
        check_plot(Path("x" * 5000 + ".png"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"dpn-cli\[plots\]"):
        check_plot(tmp_path / "picture.png")
