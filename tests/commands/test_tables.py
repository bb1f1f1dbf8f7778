"""Tables of commands: whole at 80 columns, no number cut, and what is shown explained."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dpn_cli import console
from dpn_cli.commands import tables
from dpn_cli.commands.tables.calibration import print_calibration
from dpn_cli.commands.tables.columns import MEANINGS
from dpn_cli.commands.tables.evaluation import print_evaluation, print_routes
from dpn_cli.commands.tables.latency import print_latency
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.evaluation.evaluate import Evaluation, Result
from dpn_cli.evaluation.figures import Accuracy, Figures, Question
from dpn_cli.evaluation.judging import SampleResult
from dpn_cli.evaluation.latency import Latency, Measurement, Phase
from dpn_cli.intervals import Estimate
from tests.reports import made_up_report

ROUTE = "fixed diverse:0.35,diverse:0.5,attended:0.25+2x2,keep,exit"
LABELS = ["original", "dpn", ROUTE, "downsample 14×13", "fastv K=2", "pyramiddrop"]
KL = Estimate(0.00004, 0.00001, 0.0123)
SHARE = Estimate(0.9876, 0.95, 1.0)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_WIDTH", 80)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, which fits 80 columns."""
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    return output


def made_up_evaluation() -> Evaluation:
    accuracy = Accuracy(100, SHARE, 0.99, Estimate(-0.1234, -0.2111, -0.0345), 0.00012)
    figures = Figures(100, 0.3456, 0.1234, 123.4, KL, SHARE, SHARE, accuracy)
    samples = tuple(SampleResult(answer, 0.1, 1.0, 0.3, 12.0, (0, 1)) for answer in ("red", "red", "blue"))
    questions = tuple(Question(kind, "red", "red") for kind in ("colour", "colour", "count"))
    results = [
        Result(label.split()[0], label, 0.25, figures, {"colour": figures, "count": figures}, 0.01, KL, samples)
        for label in LABELS
    ]
    return Evaluation(questions, tuple(results), ())


def made_up_latency() -> Latency:
    phase = Phase(0.1234, 0.1, 0.2, 12.34, 11.98, 12.56)
    phases = dict.fromkeys(("vision", "prefill", "first_token", "decode"), phase)
    rows = [
        Measurement(f"{label} at 0.25", 0.345, 1.2e13, 3.4e8, 2 * 10**10, (), 0.01, 0.9, phases) for label in LABELS
    ]
    return Latency("NVIDIA H100 80GB HBM3", "bfloat16", "sdpa", 16, 32, 688, 16, 8, rows)


def test_a_calibration_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.new("RGB", (8, 8))
    report = made_up_report([Sample(str(i), (image,), (Turn("What?", "that"),)) for i in range(60)])
    print_calibration(report)
    title, rows = shown(capsys).split("FLOPs", 1)
    low, high = report.agreement_interval
    assert f"{low:.1%} to {high:.1%}" in " ".join(title.split())
    [chosen] = [line for line in rows.splitlines() if "0.5 (asked)" in line]
    assert f"{report.routed.fraction:.3f}" in chosen
    assert f"{report.routed.agreement:.1%}" in chosen
    assert report.best_fixed is not None
    assert sum(f"{report.best_fixed[1].distortion:.4f}" in line for line in rows.splitlines()) == 1
    fractions = [float(found[1]) for line in rows.splitlines() if (found := re.search(r"([01]\.\d{3}) ", line))]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] == pytest.approx(1.0, abs=1e-3)
    print_calibration(report, wide=True)
    assert len(capsys.readouterr().out.splitlines()) > len(report.budgets), "all of them"


def test_an_evaluation_shows_whole_figures_and_what_they_mean(capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(made_up_evaluation())
    output = " ".join(shown(capsys).split())
    for figure in ("0.346", "<0.0001", "98.8%", "-21.1 … -3.5", "original's, in nats", "right answers, by the labels"):
        assert figure in output
    assert "McNemar" not in output and "over dpn" not in output
    print_evaluation(made_up_evaluation(), wide=True)
    wide = capsys.readouterr().out
    assert "+0.0000 … +0.0123" in wide and "0.00012" in wide and ROUTE in wide


def test_routes_and_methods_break_between_words_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(made_up_evaluation())
    print_routes(made_up_evaluation(), lambda route: ROUTE.removeprefix("fixed "))
    output = shown(capsys)
    words = set(re.split(r"\s+|(?<=,)", output))
    assert {*re.split(r"\s+|(?<=,)", ROUTE), "downsample", "14×13", "pyramiddrop"} <= words


def test_a_latency_shows_whole_figures(capsys: pytest.CaptureFixture[str]) -> None:
    for has_data, others in ((False, ["20,000"]), (True, ["0.0100", "90.0%"])):
        print_latency(made_up_latency(), has_data)
        output = shown(capsys)
        for figure in ("0.345", "123.4", "12.34", "11.98–12.56", *others):
            assert output.count(figure) >= len(LABELS)
    print_latency(made_up_latency(), has_data=True, wide=True)
    wide = capsys.readouterr().out
    assert wide.count("decode, per token") == len(LABELS) and "ideal" in wide


def test_every_head_that_is_explained_is_shown_and_every_explanation_is_used() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(tables.__path__[0]).glob("*.py"))
    used = set(re.findall(r'means="([^"]+)"', source)) | set(re.findall(r"(?:MEANINGS\[|meaning\()'([^']+)'", source))
    assert used == MEANINGS.keys()


def test_without_labels_no_accuracy_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = made_up_evaluation()
    bare = [
        replace(result, figures=replace(result.figures, accuracy=None), kinds={"all": result.figures})
        for result in found.results
    ]
    print_evaluation(replace(found, results=tuple(bare)))
    assert "accuracy" not in shown(capsys)
