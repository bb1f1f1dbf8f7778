"""An evaluation as a picture."""

from pathlib import Path

import pytest

from dpn_cli.evaluation.contenders.contender import Contender
from dpn_cli.evaluation.contenders.dropping import Dropping
from dpn_cli.evaluation.contenders.fastv import FastV
from dpn_cli.evaluation.contenders.random_dropping import RandomDropping
from dpn_cli.evaluation.contenders.routes import Original, Routed
from dpn_cli.evaluation.evaluate import Evaluation, Standing
from dpn_cli.evaluation.figures import Question
from dpn_cli.evaluation.judging import Outcome
from dpn_cli.evaluation.pictures import plot_evaluation

QUESTIONS = tuple(Question("all", "red", "red") for _ in range(4))


def standing(contender: Contender, budget: float | None, distortion: float) -> Standing:
    outcomes = [Outcome("red", distortion * i, 1.0, budget or 1.0, 100.0) for i in range(4)]
    return Standing.of((budget, contender), outcomes, QUESTIONS, "exact")


def evaluation(*contenders: Contender) -> Evaluation:
    rows = [
        standing(each, budget, distortion) for each in contenders for budget, distortion in ((0.8, 0.0), (0.5, 0.1))
    ]
    return Evaluation(QUESTIONS, (standing(Original(), None, 0.0), *rows), ())


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_every_contender_is_named_but_the_original(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"frontier{suffix}"
    dropping: list[Dropping] = [RandomDropping(), FastV()]
    plot_evaluation(path, evaluation(Routed(), *dropping), evaluation(Routed()), names=("dpn", "dpn, healed"))
    assert path.stat().st_size > 5000
    if suffix == ".svg":
        text = path.read_text()
        assert all(f">{name}<" in text for name in ("dpn", "dpn, healed", "random", "fastv"))
        assert ">original<" not in text
