"""Axes and plots: where values stand."""

import xml.etree.ElementTree as ET

import pytest

from dpn_cli.pages import svg
from dpn_cli.pages.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Dot


def test_a_linear_axis_has_round_ticks_inside() -> None:
    axis = svg.horizontal(0.387, 1.0, percent=True)
    assert [label for _, label in axis.ticks] == ["40%", "60%", "80%", "100%"]
    assert axis.at(0.387) == LEFT
    assert axis.at(1.0) == WIDTH - RIGHT


@pytest.mark.parametrize(("low", "high"), [(0.993, 1.0), (0.0, 2880.0), (1.0, 1.0), (-0.01, 1.0)])
def test_any_range_has_few_ticks(low: float, high: float) -> None:
    axis = svg.vertical(low, high)
    assert 2 <= len(axis.ticks) <= 8
    labels = [label for _, label in axis.ticks]
    assert len(set(labels)) == len(labels)
    assert all(low - 1e-9 <= value <= axis.high + 1e-9 for value, _ in axis.ticks)


def test_zero_has_a_place_on_a_logarithmic_axis() -> None:
    axis = svg.vertical_log([0.0, 3e-9, 3e-4, 2.0])
    assert [label for _, label in axis.ticks] == ["<10⁻⁴", "10⁻⁴", "10⁻³", "0.01", "0.1", "1", "10"]
    assert axis.at(0.0) == axis.at(3e-9) == HEIGHT - BOTTOM, "where noise begins"
    assert axis.at(10.0) == pytest.approx(TOP)
    assert axis.at(1e-4) < axis.at(0.0)
    assert axis.at(0.1) - axis.at(1.0) == pytest.approx(axis.at(1.0) - axis.at(10.0))


@pytest.mark.parametrize("values", [[0.0], [1.0], [1e-12, 1e6]])
def test_odd_values_make_a_logarithmic_axis_too(values: list[float]) -> None:
    axis = svg.vertical_log(values)
    assert all(TOP - 1e-6 <= axis.at(value) <= HEIGHT - BOTTOM + 1e-6 for value in values)
    assert len(axis.ticks) <= svg.FEW_TICKS + 2


def test_plots_are_well_formed_and_escaped() -> None:
    evil = "<b>&\"'</b>"
    dots = [Dot(0.4, 1.0, evil), Dot(1.0, 0.0, evil)]
    plots = [
        svg.tradeoff_plot(
            svg.horizontal(0, 1), svg.vertical_log([0, 1]), (evil, evil), dots, [(0.4, 1.0), (1.0, 0.0)], dots, dots[0],
            name=evil,
        ),
        svg.stacked_bars([(evil, True, [(0, 0.25, evil), (7, 0.75, evil)])], (evil, evil)),
        svg.staircase([4.0, 2.0, 1.0], [4.0] * 3, [0], (evil, evil), evil),
    ]  # fmt: skip
    for plot in plots:
        root = ET.fromstring(plot)
        assert evil in {element.text for element in root.iter("title")}
        assert evil in {element.text for element in root.iter("text")}


def test_bars_fill_their_share() -> None:
    root = ET.fromstring(svg.stacked_bars([("a", False, [(0, 0.25, "x"), (1, 0.75, "y")])], ("", "")))
    small, large = (float(element.attrib["height"]) for element in root.iter("rect"))
    assert small + large == pytest.approx(HEIGHT - TOP - BOTTOM, abs=0.2)
    assert large == pytest.approx(3 * small, abs=0.3)
