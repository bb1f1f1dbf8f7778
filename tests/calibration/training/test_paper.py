"""The paper's objective against numbers worked out by hand."""

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpn_cli.calibration.passes import run_trunk, student_logits, teacher_logits
from dpn_cli.calibration.training.paper import Sampler, paper_loss, routing_loss
from dpn_cli.modeling.state import Choice
from dpn_cli.pyramid.calibration_recipe import PaperRecipe
from dpn_cli.pyramid.config import RouterConfig
from tests.calibration.training.test_heal import PAD, examples

__all__ = ["examples"]

PAPER: dict[str, Any] = {
    "gate": "probability",
    "positions": "contiguous",
    "router": RouterConfig(input="last_instruction_token", output="logits"),
}


class FixedRouter(nn.Module):
    """Gives every sample the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float32))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(features), -1)


def test_the_hinge_by_hand() -> None:
    # (0·0.2 + 1·0.3 + 2·0.5 + 2·0.4) / 4 = 0.525
    entries = [torch.tensor([0.0, 0.3]), torch.tensor([1.0, 0.8])]
    assert routing_loss(entries, 1.5).item() == pytest.approx(1.5 - 0.525)
    assert routing_loss(entries, 0.5).item() == 0
    assert routing_loss([], 1.5).item() == 0


def authors_hinge(router_states: list[list[float]]) -> float:
    """Return what the authors' loss.py gives for softmax(logits / 10) of every sample at every site."""
    entries = []
    for logits in router_states:
        weights = [math.exp(logit / 10) for logit in logits]
        best = weights.index(max(weights))
        entries.append((0, 1, 2)[best] * weights[best] / sum(weights))
    return max(0.0, 1.5 - sum(entries) / len(entries))


@pytest.mark.parametrize("offered", [[0, 1, 2], [0, 1], [0]])
@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_the_hinge_is_the_authors_whatever_is_drawn(scale: float, offered: list[int]) -> None:
    states = (torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(int(scale))) * scale).tolist()
    text_model = SimpleNamespace(
        routers=[lambda features, site=site: torch.tensor(site) for site in states],
        router_features=lambda state: None,
        pyramid=SimpleNamespace(offered=lambda site, grids: offered),
    )
    sampler = Sampler(text_model, random.Random(0))
    for site in range(3):
        sampler.choose(SimpleNamespace(grids=[((12, 12),)] * 4), site)  # type: ignore[arg-type]
    expected = authors_hinge([logits for site in states for logits in site])
    assert routing_loss(sampler.entries, 1.5).item() == pytest.approx(expected, abs=1e-6)


def sample(logits: list[float], grids: list[Any], offered: list[int], seed: int = 0) -> tuple[Choice, Sampler]:
    text_model = SimpleNamespace(
        routers=[FixedRouter(logits)],
        router_features=lambda state: torch.zeros(len(state.grids), 1, 4),
        pyramid=SimpleNamespace(offered=lambda site, grids: offered if grids else [0]),
    )
    sampler = Sampler(text_model, random.Random(seed))
    return sampler.choose(SimpleNamespace(grids=grids), 0), sampler  # type: ignore[arg-type]


def test_rates_are_drawn_from_softmax_of_a_tenth_of_the_logits() -> None:
    logits = [0.0, 10.0, 20.0]
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(-1)
    choice, sampler = sample(logits, [((12, 12),)] * 4000, [0, 1, 2])
    shares = torch.tensor(choice.experts).bincount() / 4000
    assert torch.allclose(shares, expected, atol=0.03)
    assert choice.probability is not None
    assert torch.allclose(choice.probability, expected[choice.experts])
    assert torch.allclose(sampler.entries[0], 2 * expected[2])


def test_a_rate_that_is_not_offered_is_not_drawn_however_likely() -> None:
    choice, _ = sample([0.0, 0.0, 1000.0], [((4, 4),)] * 50, [0, 1])
    assert set(choice.experts) == {0, 1}


def test_samples_without_an_image_do_not_count() -> None:
    choice, sampler = sample([0.0, 0.0, 1000.0], [(), ((12, 12),), ()], [0, 1, 2])
    assert choice.experts == [0, 2, 0]
    assert len(sampler.entries[0]) == 1


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_whole_loss_by_hand(make_pair: Any, examples: Any, loss: str) -> None:
    _, model = make_pair(**PAPER)
    text_model = model.text_model
    text_model.routers = nn.ModuleList(FixedRouter(z) for z in ([0, 0, 900], [900, 0, 0], [0, 0, 0]))
    trunk = run_trunk(model, examples[:2], [True, True], PAD)
    found = paper_loss(model, trunk, PaperRecipe(loss=loss, routing_weight=0.5), random.Random(1))  # type: ignore[arg-type]

    # Sites 1 and 2 are certain: 2×2 then 1×1; at site 3 each rate has a third, drawn by the same generator.
    rng = random.Random(1)
    routes = [[2, 2], [0, 0], [0, 0]]
    for site in range(3):
        offered = [0, 1, 2] if site < 1 else [0, 1]  # 12×12 → 6×6 → 3×3 tokens, at least 16
        for row in range(2):
            draw = rng.choices(offered, [[0, 0, 1], [1, 0, 0], [1 / 3] * 3][site][: len(offered)])[0]
            routes[site][row] = draw
    gates = [torch.ones(2), torch.ones(2), torch.full((2,), 1 / 3)]
    student = student_logits(model, trunk, lambda state, site: Choice(routes[site], gates[site]))
    hinge = 1.5 - (2 + 0 + 0) / 3  # of each site's likeliest rate: of equals the first, 1×1
    if loss == "ce":
        task = F.cross_entropy(student, trunk.targets)
    else:
        teacher = teacher_logits(model, trunk).log_softmax(-1)
        task = (teacher.exp() * (teacher - student.log_softmax(-1))).sum(-1).mean()
    assert found.item() == pytest.approx((task + 0.5 * max(0, hinge)).item(), rel=1e-4)


def test_the_gate_has_its_gradient_at_1x1_too(make_pair: Any, examples: Any) -> None:
    _, model = make_pair(**PAPER)
    text_model = model.text_model
    text_model.routers = nn.ModuleList(FixedRouter([60.0, 0.0, 0.0]) for _ in range(3))
    trunk = run_trunk(model, examples[:2], [True, True], PAD)
    sampler = Sampler(text_model, random.Random(0))
    F.cross_entropy(student_logits(model, trunk, sampler.choose), trunk.targets).backward()
    assert [entry.abs().sum().item() for entry in sampler.entries] == [0, 0, 0], "all took 1×1"
    assert all(router.logits.grad.abs().sum() > 0 for router in text_model.routers)
    assert routing_loss(sampler.entries, 1.5).item() == 1.5
