"""An evaluation as a picture."""

from collections.abc import Sequence
from pathlib import Path

from dpn_cli.evaluation.evaluate import Evaluation, Standing
from dpn_cli.evaluation.plots import Point, Series, plot_frontier

SMALLEST = 1e-6  # nats: what a logarithmic axis can still show


def plot_evaluation(path: Path, *evaluations: Evaluation, names: Sequence[str] = ("dpn",)) -> None:
    """Draw the KL of every contender over the FLOPs that it spent, with intervals.

    Args:
        path: of the picture.
        evaluations: of the first all contenders are drawn, of the others the pyramid alone.
        names: of the evaluations' pyramids.
    """
    first, *_ = evaluations
    others = dict.fromkeys(standing.contender for standing in first.standings)
    series = [Series(name, _points(each.of("dpn"))) for name, each in zip(names, evaluations, strict=True)]
    series += [Series(name, _points(first.of(name))) for name in others if name not in ("original", "dpn")]
    plot_frontier(path, series, "KL from the original, nats per answer token", log=True)


def _points(standings: Sequence[Standing]) -> list[Point]:
    points = []
    for figures in (standing.figures for standing in standings):
        low, value, high = (
            max(number, SMALLEST)
            for number in (figures.distortion.low, figures.distortion.value, figures.distortion.high)
        )
        points.append(Point(figures.fraction, value, y_interval=(low, high)))
    return points
