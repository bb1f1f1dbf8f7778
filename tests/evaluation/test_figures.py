"""Figures of made-up results."""

import pytest

from dpn_cli.evaluation.figures import Figures, Question, by_kind
from dpn_cli.evaluation.judging import SampleResult

QUESTIONS = [
    Question("letter", "A", "a"),
    Question("letter", "B", "C"),
    Question("count", "3", "three"),
    Question("count", None, "two"),
]


def result(answer: str, distortion: float = 0.0, fraction: float = 0.5) -> SampleResult:
    return SampleResult(answer, distortion, agreement=1.0, fraction=fraction, visual_tokens=10)


def test_figures_are_means() -> None:
    results = [result("a", 0.2, 0.4), result("B", 0.4, 0.6), result("4"), result("two")]
    figures = Figures.of(results, QUESTIONS, "exact")
    assert (figures.count, figures.fraction) == (4, pytest.approx(0.5))
    assert figures.fraction_spread == pytest.approx((0.02 / 4) ** 0.5)
    assert figures.distortion.value == pytest.approx(0.15)
    assert figures.same_answer.value == 0.5, "word for word: `a` and `two`"
    accuracy = figures.accuracy
    assert accuracy is not None and accuracy.count == 3, "one sample has no label"
    assert accuracy.score.value == pytest.approx(2 / 3) and accuracy.teacher == pytest.approx(2 / 3)
    assert accuracy.change.value == 0 and accuracy.change.low < 0 < accuracy.change.high
    assert accuracy.mcnemar == 1.0


def test_kinds_are_apart_and_in_order() -> None:
    results = [result("a"), result("b"), result("3", 1.0), result("two", 1.0)]
    kinds = by_kind(results, QUESTIONS, "exact")
    assert list(kinds) == ["letter", "count"]
    assert [kinds[kind].distortion.value for kind in kinds] == [0, 1]
    assert kinds["count"].accuracy is not None and kinds["count"].accuracy.count == 1


def test_without_labels_there_is_no_accuracy() -> None:
    assert Figures.of([result("x")], [Question("all", None, "x")], "exact").accuracy is None


def test_the_metric_is_the_one_asked_for() -> None:
    question = [Question("all", "coca cola", "coca cola")]
    scores = {}
    for metric in ("exact", "anls"):
        accuracy = Figures.of([result("coca colla")], question, metric).accuracy
        assert accuracy is not None
        scores[metric] = accuracy.score.value
    assert scores == {"exact": 0, "anls": pytest.approx(0.9)}
