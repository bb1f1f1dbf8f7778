"""The measured table against plain forwards along the same routes."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dpn_cli.calibration.policy import Policy
from dpn_cli.calibration.rollout import RouteTable, RouteTree, measure, plan_batches
from dpn_cli.calibration.state import MeasurementState, drop_state
from dpn_cli.data.encoding import IGNORED, Example
from dpn_cli.errors import CheckpointError, DataError, UsageError
from dpn_cli.pyramid.budgets import Budget
from dpn_cli.pyramid.config import Route, RouterConfig, Site
from dpn_cli.pyramid.experts import Expert
from tests.pyramids import prompt, pyramid


def examples() -> list[Example]:
    shapes = [(1, 3, 5, 2), (2, 2, 6, 3), (1, 9, 2, 1), (1, 1, 17, 4)]
    result = []
    for seed, (images, before, after, answer) in enumerate(shapes):
        sample = prompt(images, before, after, seed)
        ids = torch.cat([sample["input_ids"][0], torch.arange(50, 50 + answer)])
        labels = torch.full_like(ids, IGNORED)
        labels[-answer:] = ids[-answer:]
        result.append(Example(ids, labels, {"pixel_values": sample["pixel_values"]}))
    return result


def measured(model: Any, samples: list[Example], batch_size: int = 2, **kwargs: Any) -> RouteTable:
    grids = [((12, 12),) * len(sample.visual["pixel_values"]) for sample in samples]
    tree = RouteTree.of(model.pyramid, grids)
    batches = plan_batches(tree, model.pyramid, grids, batch_size, None)
    return measure(model, samples, tree, batches, pad_token_id=3, **kwargs)


@pytest.mark.parametrize("gate", ["none", "probability"])
def test_every_route_equals_a_forced_forward(make_pair: Any, gate: str) -> None:
    stock, model = make_pair(gate=gate)
    samples = examples()
    table = measured(model, samples)
    checked = 0
    for i, sample in enumerate(samples):
        inputs = {"input_ids": sample.input_ids[None], "pixel_values": sample.visual["pixel_values"]}
        answers = (sample.labels[1:] != IGNORED).nonzero()[:, 0]
        with torch.no_grad():
            teacher = stock(**inputs).logits[0, answers].log_softmax(-1)
        for column, route in list(enumerate(table.tree.routes))[::6]:
            model.set_route(route)
            with torch.no_grad():
                student = model(**inputs, labels=sample.labels[None]).logits[0, answers].log_softmax(-1)
            divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
            assert table.distortion[i, column] == pytest.approx(divergence.item(), abs=1e-4)
            same = (student.argmax(-1) == teacher.argmax(-1)).float().mean()
            assert table.agreement[i, column] == pytest.approx(same.item())
            checked += 1
    assert checked > 10
    if gate == "none":
        assert (table.distortion[:, 0] == 0).all() and (table.agreement[:, 0] == 1).all()
    else:
        assert (table.distortion[:, 0] > 0).all(), "the gate scales even unpooled tokens"


def test_features_are_what_the_router_reads(make_pair: Any) -> None:
    _, model = make_pair()
    sample = examples()[0]
    table = measured(model, [sample])
    text_model = model.text_model
    seen = []
    text_model.routers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=sample.input_ids[None], pixel_values=sample.visual["pixel_values"], labels=sample.labels[None])
    prefix = model.last_routes[0][:1]
    stored = table.features[0, table.tree.prefixes.index(prefix)]
    assert torch.allclose(stored.float(), seen[0][0].float(), rtol=1e-3, atol=1e-2)


LISTED = {
    "sites": tuple(
        Site(layer, tuple(map(Expert.parse, names)))
        for layer, names in (
            (-1, ("keep", "diverse:0.5", "pool:2x2")),
            (1, ("keep", "attended:0.5", "pool:1x2")),
            (5, ("keep", "exit")),
        )
    ),
    "routes": ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 2, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 2, 0)),
    "router": RouterConfig(output="routes"),
}


@pytest.mark.parametrize("settings", [{"router": RouterConfig()}, LISTED], ids=["all routes", "listed routes"])
def test_routed_forward_takes_the_route_that_the_table_predicts(make_pair: Any, settings: dict[str, Any]) -> None:
    _, model = make_pair(**settings)
    text_model = model.text_model
    samples = examples()
    table = measured(model, samples)
    policy = Policy.of(text_model.routers, table)
    routes = set()
    for trade_off in (0.0, 0.1, 1.0, 10.0):
        model.pyramid = replace(model.pyramid, trade_off=trade_off)
        with torch.no_grad():
            taken = policy.choose_as(model.pyramid, trade_off).tolist()
            for sample, column in zip(samples, taken, strict=True):
                model(
                    input_ids=sample.input_ids[None],
                    pixel_values=sample.visual["pixel_values"],
                    labels=sample.labels[None],
                )
                assert model.last_routes == [table.tree.routes[column]]
                routes.add(model.last_routes[0])
    assert len(routes) >= 2


def test_where_predictions_are_not_trusted_all_take_what_is_best_in_the_mean(make_pair: Any) -> None:
    means = (0.0, 0.5, 0.2, 0.3, 0.1, 0.4, 0.6, 0.9, 0.7)
    budgets = (Budget(0.8, 0.1, 0.01, 1.0), Budget(0.5, 1.0, 0.05, 0.0), Budget(0.3, 5.0, 0.5, 0.5))
    _, model = make_pair(**LISTED, mean_losses=means, budgets=budgets)
    samples = examples()
    table = measured(model, samples)
    policy = Policy.of(model.text_model.routers, table)
    taken = {}
    for trade_off in (0.1, 1.0, 5.0):
        with torch.no_grad():
            taken[trade_off] = policy.choose_as(model.pyramid, trade_off)
        model.pyramid = replace(model.pyramid, trade_off=trade_off)
        for sample, column in zip(samples, taken[trade_off].tolist(), strict=True):
            with torch.no_grad():
                model(
                    input_ids=sample.input_ids[None],
                    pixel_values=sample.visual["pixel_values"],
                    labels=sample.labels[None],
                )
            assert model.last_routes == [table.tree.routes[column]]
    best = (torch.tensor(means) + 1.0 * table.fraction).argmin(1)
    assert torch.equal(taken[1.0], best)


def test_a_part_of_the_routes_is_measured_like_the_whole(make_pair: Any) -> None:
    _, model = make_pair()
    samples = examples()
    whole = measured(model, samples)
    grids = [((12, 12),) * len(sample.visual["pixel_values"]) for sample in samples]
    tree = RouteTree.of(model.pyramid, grids)
    batches = plan_batches(tree, model.pyramid, grids, 2, num_routes=4, complete={1})
    part = measure(model, samples, tree, batches, pad_token_id=3)
    assert part.measured.sum(1).tolist() == [4, len(whole.tree.routes), 4, 4]
    assert torch.allclose(part.distortion[part.measured], whole.distortion[part.measured], atol=1e-5)
    assert torch.equal(part.fraction, whole.fraction) and torch.equal(part.offered, whole.offered)


@pytest.mark.parametrize("listed", [None, ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (2, 1, 0))])
def test_partial_plans_see_every_route_equally_often(listed: tuple[Route, ...] | None) -> None:
    config = replace(pyramid(min_visual_tokens=1), routes=listed)
    tree = RouteTree.of(config, [((24, 24),)])
    batches = plan_batches(tree, config, [((24, 24),)] * 90, batch_size=1, num_routes=4)
    assert all(batch.routes[0] == (0, 0, 0) and len(set(batch.routes)) == 4 for batch in batches)
    seen = Counter(route for batch in batches for route in batch.routes[1:])
    assert set(seen) == set(tree.routes[1:]) and max(seen.values()) - min(seen.values()) <= 1


def test_kept_batches_are_not_measured_again(make_pair: Any, tmp_path: Path) -> None:
    _, model = make_pair()
    samples = examples()
    first = measured(model, samples, kept=MeasurementState(tmp_path, {"seed": 0}).measurements)
    (tmp_path / "calibration" / "state" / "batch-000001.safetensors").write_bytes(b"torn")
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    again = measured(model, samples, kept=MeasurementState(tmp_path, {"seed": 0}).measurements)
    assert 0 < len(calls) <= len(first.tree.routes), "only the torn batch is measured again"
    assert torch.equal(first.distortion, again.distortion) and torch.equal(first.features, again.features)


def test_a_sample_whose_answers_are_no_numbers_is_named(make_pair: Any) -> None:
    _, model = make_pair()
    samples = examples()
    noise = {"pixel_values": samples[3].visual["pixel_values"] * torch.nan}
    samples[3] = replace(samples[3], visual=noise, name="row 4")
    with pytest.raises(DataError, match="row 4: the model's outputs for it are not finite numbers"):
        measured(model, samples)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.language_model.layers.0.input_layernorm.weight"])
def test_a_model_whose_weights_are_no_numbers_is_a_bad_checkpoint(make_pair: Any, name: str) -> None:
    _, model = make_pair(**LISTED)
    with torch.no_grad():
        model.get_parameter(name)[0] = torch.nan
    with pytest.raises(CheckpointError, match=rf"'{name}' holds NaN"):
        measured(model, examples())


def test_a_state_of_another_calibration_is_refused(tmp_path: Path) -> None:
    MeasurementState(tmp_path, {"seed": 0, "data": "a"})
    with pytest.raises(UsageError, match="other values of data, seed"):
        MeasurementState(tmp_path, {"seed": 1, "data": "b"})
    with pytest.raises(UsageError, match="an unfinished calibration without --heal-only: run its command"):
        MeasurementState(tmp_path, {"seed": 0, "data": "a", "only": "heal"})
    MeasurementState(tmp_path / "healed", {"seed": 0, "only": "heal"})
    with pytest.raises(UsageError, match="an unfinished calibration with --heal-only: run its command"):
        MeasurementState(tmp_path / "healed", {"seed": 0, "only": None})
    drop_state(tmp_path)
    MeasurementState(tmp_path, {"seed": 1, "data": "b"})
