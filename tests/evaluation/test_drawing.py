"""An evaluation as a picture."""

from pathlib import Path

import pytest

from dpn_cli.evaluation import drawing
from dpn_cli.evaluation.baselines.baseline import Baseline
from dpn_cli.evaluation.baselines.routes import Original, Routed
from dpn_cli.evaluation.baselines.static import StaticPyramid
from dpn_cli.evaluation.drawing import plot_evaluation, plot_latency
from dpn_cli.evaluation.evaluate import Evaluation, Result
from dpn_cli.evaluation.figures import Question
from dpn_cli.evaluation.judging import SampleResult
from dpn_cli.evaluation.latency import Latency, Measurement, Phase
from dpn_cli.evaluation.plots import Point

QUESTIONS = tuple(Question("all", "red", "red") for _ in range(4))


def result(method: Baseline, budget: float | None, distortion: float) -> Result:
    samples = [SampleResult("red", distortion * i, 1.0, budget or 1.0, 100.0) for i in range(4)]
    return Result.of((budget, method), samples, QUESTIONS, "exact")


def evaluation(*methods: Baseline) -> Evaluation:
    rows = [result(each, budget, distortion) for each in methods for budget, distortion in ((0.8, 0.0), (0.5, 0.1))]
    return Evaluation(QUESTIONS, (result(Original(), None, 0.0), *rows), ())


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_every_method_is_named_but_the_original(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"frontier{suffix}"
    others = [StaticPyramid("random"), StaticPyramid("fastv")]
    plot_evaluation(path, evaluation(Routed(), *others), evaluation(Routed()), names=("dpn", "dpn, healed"))
    assert path.stat().st_size > 5000
    if suffix == ".svg":
        text = path.read_text()
        assert all(f">{name}<" in text for name in ("dpn", "dpn, healed", "random", "fastv"))
        assert ">original<" not in text


def test_a_method_at_several_budgets_is_one_series(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(name: str, fraction: float, speedup: float) -> Measurement:
        prefill = Phase(1.0, 1.0, 1.0, speedup, speedup / 2, speedup * 2)
        return Measurement(name, fraction, 1.0, 1.0, None, (), 0.1, 1.0, {"prefill": prefill})

    methods = [measured("original", 1.0, 1.0), measured("dpn at 0.5", 0.5, 2.0), measured("dpn at 0.4", 0.4, 2.5)]
    latency = Latency("CPU", "float32", "sdpa", 1, 3, 100, 4, 6, methods)
    drawn = []
    monkeypatch.setattr(drawing, "plot_latency_flops", lambda path, panels: drawn.append(panels))
    monkeypatch.setattr(drawing, "plot_latency_fidelity", lambda path, panels, what: drawn.append(panels))
    for has_data in (False, True):
        plot_latency(Path("unused.png"), [latency], has_data)
    flops, fidelity = (panels["batch of 3"] for panels in drawn)
    assert [(each.name, [(p.x, p.y) for p in each.points]) for each in flops] == [
        ("original", [(1.0, 1.0)]),
        ("dpn", [(0.5, 0.5), (0.4, 0.4)]),
    ]
    assert flops[1].points[0].y_interval == (0.25, 1.0)
    assert fidelity[1].points[0] == Point(0.5, 0.1, x_interval=(0.25, 1.0))
