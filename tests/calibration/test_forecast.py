"""What a calibration is expected to cost: from counts that can be checked by hand."""

from typing import Any

import pytest
import torch

from dpn_cli.calibration import forecast as module
from dpn_cli.calibration.forecast import EFFICIENCY, Forecast, Model, Reader, forecast, layer_speed
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe, SurveyRecipe
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.experts import pool
from tests.evaluation.naive import SHAPE

MODEL = Model(SHAPE, nbytes=1000, vision_parameters=50, dtype=torch.float32, device="cpu")
PYRAMID = PyramidConfig(tuple(Site(layer, pool((1, 1), (2, 2))) for layer in (-1, 0)), min_visual_tokens=1)
LENGTHS = [(((4, 4),), 8)] * 20
RECIPE = CalibrationRecipe(samples=20, batch_size=4, holdout=0.25, answer_tokens=3)


@pytest.fixture(autouse=True)
def a_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "layer_speed", lambda model, batch_size, tokens: 1e6)


def cost(recipe: CalibrationRecipe = RECIPE, unanswered: int = 0, lengths: Any = LENGTHS, **options: Any) -> Forecast:
    return forecast(MODEL, PYRAMID, recipe, lengths, unanswered, **{"surveys": False, **options})


def test_routes_share_the_layers_before_they_part() -> None:
    tokens = {
        route: [8 + 16 // (4 if 1 in route[:site] else 1) for site in (0, 1, 2)] for route in [(0, 0), (1, 0), (0, 1)]
    }
    assert tokens == {(0, 0): [24, 24, 24], (1, 0): [24, 12, 12], (0, 1): [24, 24, 12]}
    first, rest = SHAPE.layer_flops, SHAPE.num_layers - 1
    nodes = [
        first(24),
        first(12),
        rest * first(24),
        rest * first(12),
        rest * first(12),
    ]  # keep|, pool|, then the second site
    vision = 2 * MODEL.vision_parameters * 16
    routes = len(list(PYRAMID.routes_for(((4, 4),))))
    found = cost()
    assert found.forward_flops == pytest.approx(20 * (vision + routes * sum(nodes) / 3))
    assert found.seconds == pytest.approx(found.forward_flops / (EFFICIENCY * 1e6))


def test_what_costs_more_is_expected_to_cost_more() -> None:
    plain = cost()
    assert cost(lengths=LENGTHS * 2).forward_flops == pytest.approx(2 * plain.forward_flops)
    assert cost(lengths=LENGTHS * 2).disk_bytes == 2 * plain.disk_bytes
    assert cost(unanswered=20).forward_flops > plain.forward_flops < cost(surveys=True).forward_flops
    watching = cost(watched=10)
    assert watching.forward_flops - plain.forward_flops == pytest.approx(10 * Reader(MODEL, LENGTHS).answering(0))
    wide = cost(RECIPE.model_copy(update={"survey": SurveyRecipe(width=40)}), surveys=True)
    assert wide.forward_flops > cost(surveys=True).forward_flops
    assert cost(RECIPE.model_copy(update={"batch_size": 16})).memory_bytes > plain.memory_bytes > MODEL.nbytes
    many = cost(lengths=LENGTHS * 1000)
    some = cost(RECIPE.model_copy(update={"routes": 2}), lengths=LENGTHS * 1000)
    assert some.forward_flops < many.forward_flops
    assert "the measurement of 5000 samples on 4 routes and 15000 samples on 2 routes" in " ".join(some.basis)


def test_another_teacher_reads_every_sample_once_more_and_answers() -> None:
    model = Model(SHAPE, nbytes=500, vision_parameters=70, dtype=torch.float32, device="cpu")
    teacher = Reader(model, [(((2, 2),), 10)] * 20)
    reading = 2 * 70 * 4 + SHAPE.num_layers * SHAPE.layer_flops(14)
    answer = 3 / 14 * SHAPE.num_layers * SHAPE.layer_flops(14)
    plain, taught = cost(), cost(unanswered=5, teacher=teacher)
    assert taught.forward_flops - plain.forward_flops == pytest.approx(25 * reading + 5 * answer)
    assert taught.memory_bytes == plain.memory_bytes + 500
    assert "5 samples are answered by the teacher" in " ".join(taught.basis)


def test_the_figures_say_what_they_come_from() -> None:
    said = " ".join(cost(surveys=True, unanswered=3).basis)
    assert "15 samples on 2 routes" in said and "20 samples on 16 routes" in said
    assert "3 samples are answered by" in said
    assert "decoder layer in float32 on cpu, measured just now" in said and "Training" not in said
    assert "FLOPs of watching the attention on 9 samples and the measurement of 20" in " ".join(cost(watched=9).basis)
    assert "on 9 samples, a survey (" in " ".join(cost(watched=9, surveys=True).basis)
    healing = RECIPE.model_copy(update={"heal": RECIPE.heal.model_copy(update={"method": "lora"})})
    assert "Training an adapter, and measuring again with it, comes on top" in " ".join(cost(healing).basis)


def test_the_papers_training_measures_the_held_out_samples_alone() -> None:
    found = cost(RECIPE.model_copy(update={"objective": "paper"}))
    assert found.forward_flops == pytest.approx(cost().forward_flops / 4)
    assert found.disk_bytes == cost().disk_bytes / 4
    assert "the measurement of 5 samples on 4 routes" in " ".join(found.basis)
    assert "The training comes on top." in found.basis


def test_the_speed_of_a_layer_is_measured_on_a_whole_batch_if_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def run(self: Any, rows: int, length: int) -> float:
        seen.append((rows, length))
        return rows * length * seconds_per_token

    monkeypatch.setattr(module._Layer, "run", run)
    for seconds_per_token, last in ((1e-3, (4, 100)), (0.1, (1, 64))):
        seen.clear()
        length = last[1]
        assert layer_speed(MODEL, 4, 100) == pytest.approx(SHAPE.layer_flops(length) / (length * seconds_per_token))
        assert seen[-1] == last


def test_a_layer_of_the_decoder_runs() -> None:
    assert 0 < module._Layer(MODEL).run(2, 5) < 60
