"""Pictures of what was measured: one style, for print and for readers who cannot tell all colours apart.

Every method has a colour of its own, and a marker and a line style too.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.workplace import workplace
from dpn_cli.checkpoint.writer import replace_file
from dpn_cli.errors import MissingExtraError, UsageError

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito 2008, https://jfly.uni-koeln.de/color/, without the faint yellow; wine, grey, olive and brown.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#808080", "#999933",
    "#661100",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "h", "p", ">")  # no common factor with colours and lines
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.titleweight": "bold", "legend.fontsize": 8, "lines.linewidth": 1.4,
    "lines.markersize": 5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "axes.axisbelow": True, "svg.fonttype": "none",
    "savefig.dpi": 200, "svg.hashsalt": "dpn", "errorbar.capsize": 2,
    "legend.frameon": False, "legend.handlelength": 3.2,
}  # fmt: skip
_SHOWN = 40  # characters of a name in a message
Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One measurement; an interval, where there is one, encloses its value."""

    x: float
    y: float
    x_interval: Interval | None = None
    y_interval: Interval | None = None


@dataclass(frozen=True)
class Series:
    """What one method reached."""

    name: str
    points: Sequence[Point]


def check_plot(path: Path) -> None:
    """Find out, before anything is measured, whether a picture can be drawn there.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        UsageError: if the format is unknown, or the folder is missing or cannot be written.
    """
    _matplotlib()
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: expected a file that ends in {' or '.join(FORMATS)}")
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        name = str(path)
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
        raise UsageError(f"--plot {shown}: {error.strerror}") from None
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--plot {path}: the folder {path.parent} cannot be written")


def plot_frontier(path: Path, series: Sequence[Series], quantity: str, log: bool = False) -> None:
    """Draw what every method keeps at every budget, with intervals.

    Args:
        path: the picture's file; its suffix says the format.
        series: the methods; x is the FLOPs fraction that was spent, y the quantity.
        quantity: Name of the y axis, with its unit.
        log: whether the y axis is logarithmic, for divergences over several orders of magnitude.
    """
    with _figure(path, 1) as (figure, [axes]):
        for style, each in zip(_styles(), series, strict=False):
            _errorbar(axes, sorted(each.points, key=lambda point: point.x), label=each.name, **style)
        if log:
            axes.set_yscale("log")
        axes.set(xlabel="fraction of the original's prefill FLOPs", ylabel=quantity)
        _legend(figure, axes)


def plot_latency_flops(path: Path, panels: Mapping[str, Sequence[Series]]) -> None:
    """Draw prefill time against FLOPs, both relative to the original, one panel beside another.

    Args:
        path: the picture's file.
        panels: the methods by panel title; x is the FLOPs fraction, y the fraction of the original's prefill time.
    """
    with _figure(path, len(panels)) as (figure, all_axes):
        for axes, (title, series) in zip(all_axes, panels.items(), strict=True):
            axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=(0, (1, 1)), label="time = FLOPs")
            _scatter(axes, series)
            axes.set(title=title, xlabel="fraction of the original's prefill FLOPs")
            axes.set_xlim(0, 1.05)
            axes.set_ylim(bottom=0)
        all_axes[0].set_ylabel("fraction of the original's prefill time")
        _legend(figure, all_axes[-1])


def plot_latency_fidelity(path: Path, panels: Mapping[str, Sequence[Series]], quantity: str) -> None:
    """Draw what every method keeps against the prefill time it takes, one panel beside another.

    Args:
        path: the picture's file.
        panels: the methods by panel title; x is the fraction of the original's prefill time, y the quantity.
        quantity: Name of the y axis, with its unit.
    """
    with _figure(path, len(panels)) as (figure, all_axes):
        for axes, (title, series) in zip(all_axes, panels.items(), strict=True):
            _scatter(axes, series)
            axes.set(title=title, xlabel="fraction of the original's prefill time")
            axes.set_xlim(left=0)
        all_axes[0].set_ylabel(quantity)
        _legend(figure, all_axes[-1])


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("a picture (--plot)", "matplotlib", "plots") from None
    return matplotlib


@contextmanager
def _figure(path: Path, panels: int) -> Iterator[tuple[Any, list[Any]]]:
    """Yield a figure and its axes, side by side, and write it when all is drawn."""
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.0 + 3.6 * panels, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])
        kind = path.suffix.lower().removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {}
        refusal = f"{path} is being drawn by " + "{holder}: wait for it, or choose another file"
        with workplace(path, refusal, "choose another folder") as work:
            replace_file(path, lambda stage: figure.savefig(stage, format=kind, metadata=metadata), work)


def _styles() -> Iterator[dict[str, Any]]:
    """Yield colour, marker and line style of one method after another; their cycles differ in length."""
    for colour, marker, line in zip(cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False):
        yield {"color": colour, "marker": marker, "linestyle": line}


def _scatter(axes: Any, series: Sequence[Series]) -> None:
    for style, each in zip(_styles(), series, strict=False):
        _errorbar(axes, each.points, label=each.name, **{**style, "linestyle": "none"})


def _errorbar(axes: Any, points: Sequence[Point], **style: Any) -> None:
    """Draw points with their intervals."""
    x, y = [point.x for point in points], [point.y for point in points]
    x_error = _error(x, [point.x_interval for point in points])
    y_error = _error(y, [point.y_interval for point in points])
    axes.errorbar(x, y, xerr=x_error, yerr=y_error, elinewidth=0.8, **style)


def _error(values: Sequence[float], intervals: Sequence[Interval | None]) -> list[list[float]] | None:
    """Return matplotlib's distances below and above the values; None where no point has an interval."""
    if not any(intervals):
        return None
    ends = [interval or (value, value) for value, interval in zip(values, intervals, strict=True)]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    return [below, above]


def _legend(figure: Any, axes: Any) -> None:
    """Put one legend to the right of all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
