"""The measured table against plain forwards along the same routes."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dpn_cli.calibration.encoding import IGNORED, Example
from dpn_cli.calibration.rollout import measure
from tests.pyramids import prompt


def examples() -> list[Example]:
    shapes = [(1, 3, 5, 2), (2, 2, 6, 3), (1, 9, 2, 1), (1, 1, 17, 4)]
    result = []
    for seed, (images, before, after, answer) in enumerate(shapes):
        sample = prompt(images, before, after, seed)
        ids = torch.cat([sample["input_ids"][0], torch.arange(50, 50 + answer)])
        labels = torch.full_like(ids, IGNORED)
        labels[-answer:] = ids[-answer:]
        result.append(Example(ids, labels, sample["pixel_values"]))
    return result


@pytest.mark.parametrize("gate", ["none", "probability"])
def test_every_route_equals_a_forced_forward(make_pair: Any, gate: str) -> None:
    stock, model = make_pair(gate=gate)
    samples = examples()
    table = measure(model, samples, batch_size=2, pad_token_id=3)
    checked = 0
    for i, sample in enumerate(samples):
        inputs = {"input_ids": sample.input_ids[None], "pixel_values": sample.pixel_values}
        answers = (sample.labels[1:] != IGNORED).nonzero()[:, 0]
        with torch.no_grad():
            teacher = stock(**inputs).logits[0, answers].log_softmax(-1)
        for column, route in list(enumerate(table.tree.routes))[::4]:
            model.set_route(route)
            with torch.no_grad():
                student = model(**inputs, labels=sample.labels[None]).logits[0, answers].log_softmax(-1)
            if gate == "probability":
                continue  # a forced route is not gated: only the teacher is compared below
            divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
            assert table.distortion[i, column] == pytest.approx(divergence.item(), abs=1e-4)
            same = (student.argmax(-1) == teacher.argmax(-1)).float().mean()
            assert table.agreement[i, column] == pytest.approx(same.item())
            checked += 1
    if gate == "none":
        assert checked > 10
        assert (table.distortion[:, 0] == 0).all() and (table.agreement[:, 0] == 1).all()
    else:
        assert (table.distortion[:, 0] > 0).all(), "the gate scales even unpooled tokens"


def test_features_are_what_the_router_reads(make_pair: Any) -> None:
    _, model = make_pair()
    sample = examples()[0]
    table = measure(model, [sample], batch_size=1, pad_token_id=3)
    text_model = model.model.language_model
    seen = []
    text_model.routers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=sample.input_ids[None], pixel_values=sample.pixel_values, labels=sample.labels[None])
    prefix = model.last_routes[0][:1]
    stored = table.features[0, table.tree.prefixes.index(prefix)]
    assert torch.allclose(stored.float(), seen[0][0].float(), rtol=1e-3, atol=1e-2)


def test_routed_forward_takes_the_route_that_the_table_predicts(make_pair: Any) -> None:
    from dpn_cli.calibration.policy import Policy
    from dpn_cli.modeling.pyramid_config import RouterConfig

    _, model = make_pair(router=RouterConfig())
    text_model = model.model.language_model
    samples = examples()
    table = measure(model, samples, batch_size=2, pad_token_id=3)
    policy = Policy.of(text_model.routers, table)
    routes = set()
    for trade_off in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0):
        text_model.trade_off = trade_off
        with torch.no_grad():
            taken = policy.choose(trade_off).tolist()
            for sample, column in zip(samples, taken, strict=True):
                model(
                    input_ids=sample.input_ids[None],
                    pixel_values=sample.pixel_values,
                    labels=sample.labels[None],
                )
                assert model.last_routes == [table.tree.routes[column]]
                routes.add(model.last_routes[0])
    assert len(routes) >= 3
