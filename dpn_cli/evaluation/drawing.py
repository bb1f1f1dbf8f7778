"""An evaluation, or a measurement of latency, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from dpn_cli.evaluation.baselines.routes import Original, Routed
from dpn_cli.evaluation.evaluate import Evaluation, Result
from dpn_cli.evaluation.latency import Latency, Measurement
from dpn_cli.evaluation.plots import Point, Series, plot_frontier, plot_latency_fidelity, plot_latency_flops

SMALLEST = 1e-6  # nats: what a logarithmic axis can still show


def plot_evaluation(path: Path, *evaluations: Evaluation, names: Sequence[str] = (Routed.name,)) -> None:
    """Draw the KL of every method over the FLOPs that it spent, with intervals.

    Args:
        path: the picture's file.
        evaluations: Evaluations to draw: all methods of the first one, the pyramid alone of the others.
        names: Names of the evaluations' pyramids.
    """
    first, *_ = evaluations
    others = dict.fromkeys(result.method for result in first.results)
    series = [Series(name, _points(each.pyramids)) for name, each in zip(names, evaluations, strict=True)]
    series += [Series(name, _points(first.of(name))) for name in others if name not in (Original.name, Routed.name)]
    plot_frontier(path, series, "KL from the original, nats per answer token", log=True)


def plot_latency(path: Path, results: Sequence[Latency], has_data: bool) -> None:
    """Draw the prefill time of every method, one panel per batch, against its fidelity or else its FLOPs.

    Args:
        path: the picture's file.
        results: Results to draw, one panel per batch size.
        has_data: whether the prompts were real, so that fidelity says something.
    """

    def point(each: Measurement) -> Point:
        prefill = each.phases["prefill"]
        time, interval = 1 / prefill.speedup, (1 / prefill.speedup_high, 1 / prefill.speedup_low)
        if has_data:
            return Point(time, each.distortion, x_interval=interval)
        return Point(each.fraction, time, y_interval=interval)

    panels = {}
    for result in results:
        points: dict[str, list[Point]] = {}  # a method's at several budgets belong together
        for each in result.measurements:
            points.setdefault(each.name.partition(" at ")[0], []).append(point(each))
        panels[f"batch of {result.batch_size}"] = [Series(*item) for item in points.items()]
    if has_data:
        plot_latency_fidelity(path, panels, "KL of the first token from the original's, nats")
    else:
        plot_latency_flops(path, panels)


def _points(results: Sequence[Result]) -> list[Point]:
    points = []
    for figures in (result.figures for result in results):
        low, value, high = (
            max(number, SMALLEST)
            for number in (figures.distortion.low, figures.distortion.value, figures.distortion.high)
        )
        points.append(Point(figures.fraction, value, y_interval=(low, high)))
    return points
