"""Plots as inline SVG, in the colours of the page that they stand in; no plotting library.

Every text and value is escaped on its way in: what the functions return is safe markup. Colours come from the page's
CSS classes: `mark-N` for the N-th of `NUM_COLOURS` colours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from dpn_cli.notation import SMALLEST_SHOWN

WIDTH, HEIGHT = 520, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 52
NUM_COLOURS = 8
FEW_TICKS = 6
NOISE = SMALLEST_SHOWN  # where a logarithmic axis ends: rounding alone makes a KL of about that
ZERO_BAND = 0.4  # decades that it keeps below its lowest one, for what is less

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels.

    Attributes:
        low: the value at `start`; of a logarithmic axis its exponent.
        high: the value at `stop`; likewise.
        start: Pixel where the axis starts.
        stop: Pixel where the axis ends.
        ticks: values and their labels.
        log: whether the axis is logarithmic; zero stands at `start` then.
    """

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value; one beyond the scale stands at its end."""
        if self.log:
            value = math.log10(value) if value >= NOISE else self.low
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start)


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot: its place, and what a pointer that rests on it is told."""

    x: float
    y: float
    title: str


def horizontal(low: float, high: float, percent: bool = False) -> Axis:
    """Return a linear axis along the bottom."""
    return _linear(low, high, LEFT, WIDTH - RIGHT, percent)


def vertical(low: float, high: float, percent: bool = False) -> Axis:
    """Return a linear axis up the left side."""
    return _linear(low, high, HEIGHT - BOTTOM, TOP, percent)


def vertical_log(values: Sequence[float]) -> Axis:
    """Return a logarithmic axis up the left side that shows all values; what is noise stands at its foot, as zero."""
    positive = [value for value in values if value >= NOISE] or [1.0]
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    last = max(last, first + 1)
    step = -(-(last - first) // FEW_TICKS)
    ticks = tuple((10.0**k, _power_of_ten(k)) for k in range(first, last + 1, step))
    if any(value < NOISE for value in values):
        return Axis(
            first - ZERO_BAND,
            last,
            HEIGHT - BOTTOM,
            TOP,
            ((0.0, f"<{_power_of_ten(round(math.log10(NOISE)))}"), *ticks),
            log=True,
        )
    return Axis(first, last, HEIGHT - BOTTOM, TOP, ticks, log=True)


def tradeoff_plot(
    x: Axis, y: Axis, labels: tuple[str, str], curve: Sequence[Dot], envelope: Sequence[Point], dots: Sequence[Dot],
    chosen: Dot, name: str,
) -> Markup:  # fmt: skip
    """Plot a curve against single points.

    Args:
        x: the horizontal axis.
        y: the vertical axis.
        labels: Labels of the x and y axes.
        curve: joined by a line, colour 0.
        envelope: joined by a dashed staircase, colour 1: what holds from one x to the next.
        dots: Points drawn in colour 1.
        chosen: Points to draw a ring around.
        name: Description of the plot, for readers who cannot see it.
    """
    steps = [point for a, b in pairwise(envelope) for point in (a, (b[0], a[1]))] + list(envelope[-1:])
    return _figure(
        name,
        _grid(x, y, *labels),
        _path([(x.at(px), y.at(py)) for px, py in steps], class_="line mark-1 dashed"),
        *(_circle(x, y, dot, r=4, class_="dot mark-1") for dot in dots),
        _path([(x.at(dot.x), y.at(dot.y)) for dot in curve], class_="line mark-0"),
        *(_circle(x, y, dot, r=3, class_="dot mark-0") for dot in curve),
        _circle(x, y, chosen, r=8, class_="ring"),
    )


def scatter_plot(x: Axis, y: Axis, labels: tuple[str, str], groups: Sequence[Sequence[Dot]], name: str) -> Markup:
    """Plot groups of points, each in a colour of its own, the first one in front.

    Args:
        x: the horizontal axis.
        y: the vertical axis.
        labels: the labels of both axes.
        groups: the points; the first group is the largest in size.
        name: Description of the plot, for readers who cannot see it.
    """
    circles = [
        _circle(x, y, dot, r=4 if colour == 0 else 3, class_=f"dot mark-{colour}")
        for colour, group in reversed(list(enumerate(groups)))
        for dot in group
    ]
    return _figure(name, _grid(x, y, *labels), *circles)


def stacked_bars(bars: Sequence[tuple[str, bool, Sequence[tuple[int, float, str]]]], labels: tuple[str, str]) -> Markup:
    """Plot shares of one as bars.

    Args:
        bars: (label, whether it stands out, parts from the bottom up as (colour, share, title)).
        labels: Labels of the x and y axes.
    """
    y = vertical(0, 1, percent=True)
    slot = (WIDTH - LEFT - RIGHT) / len(bars)
    marks: list[Markup] = [_grid(None, y, *labels)]
    for i, (label, stands_out, parts) in enumerate(bars):
        left, below = LEFT + i * slot, 0.0
        for colour, share, title in parts:
            top = y.at(below + share)
            marks.append(
                _element(
                    "rect", _element("title", title), x=left + slot * 0.1, y=top, width=slot * 0.8,
                    height=y.at(below) - top, class_=f"bar mark-{colour}",
                )
            )  # fmt: skip
            below += share
        marks.append(_text(label, left + slot / 2, HEIGHT - BOTTOM + 18, "strong" if stands_out else "tick"))
    return _figure(f"{labels[1]} by {labels[0]}", *marks)


def staircase(
    values: Sequence[float], reference: Sequence[float], events: Sequence[int], labels: tuple[str, str], title: str
) -> Markup:
    """Plot one value per step against a reference.

    Args:
        values: filled, colour 0.
        reference: a dashed line.
        events: steps after which something happens, marked by a vertical line.
        labels: Labels of the x and y axes.
        title: Template of a step's title, with `{step}`, `{value}` and `{reference}` to fill in.
    """
    x, y = horizontal(0, len(values)), vertical(0, max(*reference, *values, 1) * 1.04)
    floor = y.at(0)

    def outline(heights: Sequence[float]) -> list[Point]:
        return [(x.at(i + side), y.at(height)) for i, height in enumerate(heights) for side in (0, 1)]

    columns = [
        _element(
            "rect", _element("title", title.format(step=i, value=value, reference=whole)), x=x.at(i), y=TOP,
            width=x.at(i + 1) - x.at(i), height=floor - TOP, class_="hover",
        )
        for i, (value, whole) in enumerate(zip(values, reference, strict=True))
    ]  # fmt: skip
    return _figure(
        f"{labels[1]} by {labels[0]}",
        _grid(x, y, *labels),
        _path([(x.at(0), floor), *outline(values), (x.at(len(values)), floor)], class_="area mark-0"),
        _path(outline(values), class_="line mark-0"),
        _path(outline(reference), class_="line dashed neutral"),
        *(_path([(x.at(step + 1), TOP), (x.at(step + 1), floor)], class_="event") for step in events),
        *columns,
    )


def _linear(low: float, high: float, start: float, stop: float, percent: bool) -> Axis:
    high = high if high > low else low + 1.0
    rough = (high - low) / FEW_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    values = [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step)) - 2)
    return Axis(low, high, start, stop, tuple((v, f"{v:.{digits}%}" if percent else f"{v:g}") for v in values))


def _power_of_ten(exponent: int) -> str:
    return f"{10.0**exponent:g}" if abs(exponent) <= 2 else "10" + str(exponent).translate(SUPERSCRIPTS)


def _grid(x: Axis | None, y: Axis, x_label: str, y_label: str) -> Markup:
    """Return the ticks and names of both axes; without `x` the caller writes its ticks."""
    parts = [_path([(LEFT, y.at(v)), (WIDTH - RIGHT, y.at(v))], class_="rule") for v, _ in y.ticks]
    parts += [_text(label, LEFT - 8, y.at(v) + 4.5, "tick end") for v, label in y.ticks]
    for at, label in [(x.at(value), label) for value, label in x.ticks] if x else []:
        parts.append(_path([(at, HEIGHT - BOTTOM), (at, HEIGHT - BOTTOM + 5)], class_="axis"))
        parts.append(_text(label, at, HEIGHT - BOTTOM + 20, "tick"))
    parts.append(_path([(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], class_="axis"))
    parts.append(_text(x_label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "name"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(_text(y_label, 14, middle, "name side", transform=f"rotate(-90 14 {middle:g})"))
    return Markup("").join(parts)


def _figure(name: str, *content: Markup) -> Markup:
    return _element("svg", *content, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=name)


def _path(points: Sequence[Point], **attributes: object) -> Markup:
    steps = " ".join(f"{'L' if i else 'M'}{px:.1f} {py:.1f}" for i, (px, py) in enumerate(points))
    return _element("path", d=steps, **attributes)


def _circle(x: Axis, y: Axis, dot: Dot, **attributes: object) -> Markup:
    return _element("circle", _element("title", dot.title), cx=x.at(dot.x), cy=y.at(dot.y), **attributes)


def _text(content: str, x: float, y: float, class_: str, **attributes: object) -> Markup:
    return _element("text", content, x=x, y=y, class_=class_, **attributes)


def _element(tag: str, *content: str, **attributes: object) -> Markup:
    """Return an element; `class_` stands for class and `aria_label` for aria-label."""
    values = {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in attributes.items()}
    pairs = [f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in values.items()]
    return Markup(f"<{tag}{''.join(pairs)}>{Markup('').join(content)}</{tag}>")
