"""The pyramid's own ways beside the baselines."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dpn_cli.evaluation.baselines.baseline import Prompt, full_flops
from dpn_cli.evaluation.baselines.routes import FixedRoute, GivenRoutes, Original, Routed, routes_that_spend
from dpn_cli.evaluation.latency import prompts_of
from dpn_cli.pyramid.budgets import Budget
from dpn_cli.pyramid.cost import flops_fraction
from tests.evaluation.naive import SHAPE
from tests.pyramids import collate, prompt, pyramid, ragged_batch

GRID = ((12, 12),)


@torch.no_grad()
def test_original_is_the_teacher(make_pair: Any) -> None:
    stock, model = make_pair()
    sample = prompt(1, 3, 5, seed=0)
    with Original().applied(model):
        assert torch.equal(model(**sample).logits, stock(**sample).logits)
    assert Original().fractions(model, [Prompt(GRID, 9)]) == [1.0]


@torch.no_grad()
def test_a_fixed_route_is_forced_for_the_duration(make_pair: Any) -> None:
    _, model = make_pair()
    sample = prompt(1, 3, 5, seed=0)
    routed = model(**sample).logits
    baseline = FixedRoute(model.pyramid, (1, 0, 1))
    with baseline.applied(model):
        model(**sample)
        assert model.last_routes == [(1, 0, 1)]
    assert torch.equal(model(**sample).logits, routed)
    assert baseline.visual_tokens(model, [Prompt(GRID, 9)]) == [[144, 144, 72, 72, 72, 72, 36, 36]]
    assert baseline.label == "fixed pool:1x2,keep,pool:1x2"


@torch.no_grad()
def test_a_fixed_route_of_a_gated_pyramid_is_gated_and_pays_for_its_routers(make_pair: Any) -> None:
    _, model = make_pair(gate="probability")
    sample, prompts = prompt(1, 3, 5, seed=0), [Prompt(GRID, 9)]
    routed, spent = model(**sample).logits, Routed().fractions(model, prompts)
    [route] = model.last_routes
    baseline = FixedRoute(model.pyramid, route)
    with baseline.applied(model):
        assert torch.equal(model(**sample).logits, routed)
    assert baseline.fractions(model, prompts) == spent == [baseline.mean_fraction(SHAPE, prompts)]
    ungated = FixedRoute(pyramid(), route)
    assert ungated.fractions(model, prompts) < spent


@torch.no_grad()
def test_routed_spends_what_its_routes_cost(make_pair: Any) -> None:
    _, model = make_pair(budgets=(Budget(0.8, 1.0, 0.01), Budget(0.4, 30.0, 0.05)))
    batch = collate(ragged_batch())
    prompts = [Prompt(GRID * images, text) for images, text in ((1, 9), (1, 12), (0, 14), (2, 9), (1, 19), (1, 11))]
    spent = {}
    for budget in (0.8, 0.4):
        baseline = Routed(budget)
        with baseline.applied(model):
            model(**batch)
            spent[budget] = baseline.fractions(model, prompts)
    assert model.text_model.trade_off == 0
    assert spent[0.8][2] == spent[0.4][2] == 1.0
    assert sum(spent[0.4]) < sum(spent[0.8])


def test_candidates_are_the_best_routes_within_the_budget() -> None:
    offered, prompts = pyramid(min_visual_tokens=4), [Prompt(GRID, 9)]
    everything = {route: FixedRoute(offered, route) for route in offered.routes_for(GRID)}
    costs = {route: each.mean_fraction(SHAPE, prompts) for route, each in everything.items()}
    losses = {route: number * 7 % 101 / 101 for number, route in enumerate(costs)}
    router = replace(offered.router, output="routes")
    measured = replace(offered, routes=tuple(losses), mean_losses=tuple(losses.values()), router=router)
    for budget in (0.9, 0.6, 0.45):
        within = {route: cost for route, cost in costs.items() if cost <= budget + 0.01}
        found = everything[(0, 0, 0)].candidates(SHAPE, prompts, budget)
        dearest = max(within.values())
        assert {each.route for each in found} == {route for route, cost in within.items() if cost >= dearest - 0.02}
        best = FixedRoute(measured, (0, 0, 0)).candidates(SHAPE, prompts, budget)
        assert [each.route for each in best] == sorted(within, key=lambda route: losses[route])[:5]
    with pytest.raises(ValueError, match="fixed cannot spend less"):
        everything[(0, 0, 0)].candidates(SHAPE, prompts, 0.1)


def test_nothing_is_too_dear_for_a_fixed_route() -> None:
    offered = pyramid(min_visual_tokens=4)
    full = FixedRoute(offered, (0, 0, 0))
    assert full.candidates(SHAPE, [Prompt(GRID, 9)], 1.05) == [full], "routers can take the pyramid past 1"


@torch.no_grad()
def test_what_beams_spend_is_that_of_each_prompt(make_pair: Any) -> None:
    _, model = make_pair(min_visual_tokens=4)
    batch, routed = collate(ragged_batch()), Routed()
    prompts = prompts_of(model, batch)
    model.set_route([(0, 0, 0), *[(1, 0, 1)] * (len(prompts) - 1)])
    model.generate(**batch, max_new_tokens=1, do_sample=False)
    alone = routed.fractions(model, prompts), routed.visual_tokens(model, prompts)
    model.generate(**batch, max_new_tokens=1, do_sample=False, num_beams=3)
    assert len(model.last_routes) == 3 * len(prompts)
    assert (routed.fractions(model, prompts), routed.visual_tokens(model, prompts)) == alone


@torch.no_grad()
def test_given_routes_are_taken_while_the_routers_run(make_pair: Any) -> None:
    _, model = make_pair(min_visual_tokens=4)
    batch, prompts = collate(ragged_batch()), prompts_of(model, collate(ragged_batch()))
    before, asked = model(**batch).logits, []
    routes = routes_that_spend(model.text_model.shape, model.pyramid, prompts, 0.6)
    hooks = [router.register_forward_hook(lambda *_: asked.append(1)) for router in model.text_model.routers]
    baseline = GivenRoutes(given=routes)
    with baseline.applied(model):
        model(**batch)
        assert model.last_routes == list(routes)
        assert len(asked) == 3
        assert baseline.fractions(model, prompts)[2] == 1.0, "there is no image"
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("budget", [0.4, 0.55, 0.7, 0.9, 1.0])
def test_a_batch_of_routes_spends_a_budget_more_exactly_than_one(budget: float) -> None:
    offered = pyramid(min_visual_tokens=4)
    prompts = [Prompt(GRID, text) for text in (4, 30, 12, 8, 20, 6)]

    def fraction(some: list[Prompt]) -> float:
        full = [full_flops(SHAPE, each) for each in some]
        routes = routes_that_spend(SHAPE, offered, some, budget)
        costs = [flops_fraction(SHAPE, offered, r, p.grids, p.text_tokens) for r, p in zip(routes, some, strict=True)]
        return sum(cost * flops for cost, flops in zip(costs, full, strict=True)) / sum(full)

    assert fraction(prompts[:1]) == pytest.approx(budget, abs=0.06)
    assert fraction(prompts) == pytest.approx(budget, abs=0.01)


def test_prompts_count_as_much_as_a_mapping_says() -> None:
    short, long = Prompt(GRID, 4), Prompt(GRID, 300)
    route = FixedRoute(pyramid(), (1, 1, 1))
    assert route.mean_fraction(SHAPE, {short: 3.0, long: 1.0}) == route.mean_fraction(
        SHAPE, [short, long, short, short]
    )
