"""Routers on a made-up table: exact sums, and a fit that finds what there is to find."""

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_cli.calibration.budgets import budget_table
from dpn_cli.calibration.fitting import fit_routers, held_out_objective
from dpn_cli.calibration.policy import Policy, fixed_routes, outcome
from dpn_cli.calibration.rollout import RouteTable, RouteTree
from dpn_cli.modeling.routers import Router, decide
from dpn_cli.pyramid.budgets import BUDGET_STEP, Budget
from dpn_cli.pyramid.config import PyramidConfig, RouterConfig, Site
from dpn_cli.pyramid.experts import pool

RATES = ((1, 1), (1, 2), (2, 2))
PYRAMID = PyramidConfig(sites=tuple(Site(layer, pool(*RATES)) for layer in (1, 3, 5)))
SIZE = 32
EPOCHS = 25


def make_table(count: int, seed: int = 0) -> RouteTable:
    """Return a table of easy and hard samples; the features say which, pooling hurts the hard ones only."""
    generator = torch.Generator().manual_seed(seed)
    tree = RouteTree.of(PYRAMID, [[(12, 12)]])
    hard = torch.rand(count, generator=generator) < 0.5
    features = torch.randn(count, len(tree.prefixes), 1, SIZE, generator=generator)
    features[..., 0] = torch.where(hard, 6.0, -6.0)[:, None, None]
    depth = torch.tensor([sum(route) for route in tree.routes]).float()
    distortion = depth * torch.where(hard, 0.5, 0.001)[:, None]
    keep = {0: 1.0, 1: 0.5, 2: 0.25}
    fraction = torch.tensor(
        [0.25 * (1 + keep[a] + keep[a] * keep[b] + keep[a] * keep[b] * keep[c]) for a, b, c in tree.routes]
    ).expand(count, -1)
    offered = torch.ones_like(distortion, dtype=torch.bool)
    return RouteTable(tree, features.half(), offered, distortion, (distortion < 0.1).float(), fraction)


def make_routers(seed: int = 0) -> torch.nn.ModuleList:
    torch.manual_seed(seed)
    config = RouterConfig(input="last_instruction_token")
    return torch.nn.ModuleList(Router(SIZE, len(RATES), config) for _ in PYRAMID.sites)


def test_routes_that_are_not_offered_are_never_taken() -> None:
    table = make_table(20)
    blocked = [i for i, route in enumerate(table.tree.routes) if route[0] == 2]
    table.offered[:, blocked] = False
    table.distortion[:, blocked] = torch.nan
    with torch.no_grad():
        policy = Policy.of(make_routers(), table)
        assert not set(policy.choose(1e3).tolist()) & set(blocked)


def test_fitting_on_a_part_of_the_routes_is_finite_and_still_learns() -> None:
    table, held = make_table(160), make_table(80, seed=1)
    generator = torch.Generator().manual_seed(0)
    skip = torch.rand(table.distortion.shape, generator=generator) < 0.5
    skip[:, 0] = False
    table.distortion[skip] = torch.nan
    routers = make_routers()
    fit_routers(routers, table, held, epochs=EPOCHS, learning_rate=1e-2, seed=0)
    assert held_out_objective(routers, held) < 0.97


@pytest.mark.parametrize("width", [SIZE, 16 * SIZE])
def test_the_rate_of_learning_suits_the_models_width(width: int) -> None:
    turned = torch.linalg.qr(torch.randn(width, SIZE, generator=torch.Generator().manual_seed(0)))[0].T
    table, held = (
        replace(each, features=(each.features.float() @ turned * math.sqrt(width / SIZE)).half())
        for each in (make_table(160), make_table(80, seed=1))
    )
    config = RouterConfig(input="last_instruction_token")
    routers = torch.nn.ModuleList(Router(width, len(RATES), config) for _ in PYRAMID.sites)
    fit_routers(routers, table, held, epochs=EPOCHS, learning_rate=None, seed=0)
    assert held_out_objective(routers, held) < 0.95


def test_the_policy_follows_the_decision_rule_of_the_model() -> None:
    table, routers = make_table(8), make_routers()
    costs = {route: table.fraction[0, i].item() for i, route in enumerate(table.tree.routes)}
    with torch.no_grad():
        policy = Policy.of(routers, table)
        for trade_off, sample in product((0.0, 0.5, 2.0, 8.0), range(8)):
            route: tuple[int, ...] = ()
            for site in range(3):
                logits = routers[site](table.features[sample, table.tree.prefixes.index(route)][None])[0].tolist()
                options = PYRAMID.options(route, [(12, 12)])
                route = (*route, decide(logits, options, [costs[option.route] for option in options], trade_off))
            assert table.tree.routes[int(policy.choose(trade_off)[sample])] == route


def test_fitting_beats_every_fixed_route_and_is_deterministic() -> None:
    table, held = make_table(160), make_table(80, seed=1)
    routers = make_routers()
    fit_routers(routers, table, held, epochs=EPOCHS, learning_rate=1e-2, seed=0)
    assert held_out_objective(routers, held) < 0.95
    budgets = budget_table(routers, held)
    half = min(budgets, key=lambda row: abs(row.fraction - 0.75))
    fixed = [o.distortion for o in fixed_routes(held).values() if o.fraction <= half.fraction + 0.02]
    assert half.distortion < 0.5 * min(fixed)

    again = make_routers()
    fit_routers(again, table, held, epochs=EPOCHS, learning_rate=1e-2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(routers.parameters(), again.parameters(), strict=True))


def test_budget_table_falls_from_one_to_the_cheapest() -> None:
    table, routers = make_table(60), make_routers()
    rows = budget_table(routers, table)
    assert rows[0].fraction == 1.0 and rows[0].trade_off == 0.0 and rows[0].distortion == 0.0
    assert all(a.fraction > b.fraction and a.trade_off < b.trade_off for a, b in pairwise(rows))
    policy = Policy.of(routers, table)
    assert rows[-1].fraction == pytest.approx(outcome(table, policy.choose(1e6)).fraction)


@pytest.mark.parametrize("count", [3, 60])
@settings(deadline=None)  # the first one solves the table
@given(budget=st.floats(0.0, 1.0))
def test_no_budget_is_overspent_on_the_samples_that_it_was_solved_on(count: int, budget: float) -> None:
    """Few samples leave gaps in the table, in which no λ spends what is asked for."""
    table, policy, rows = solved(count)
    pyramid = replace(PYRAMID, budgets=rows)
    budget = rows[-1].fraction + budget * (1 - rows[-1].fraction)
    spent = outcome(table, policy.choose_as(pyramid, pyramid.trade_off_for(budget))).fraction
    assert spent <= budget + BUDGET_STEP


@cache
def solved(count: int) -> tuple[RouteTable, Policy, tuple[Budget, ...]]:
    table, routers = make_table(count), make_routers()
    with torch.no_grad():
        return table, Policy.of(routers, table), budget_table(routers, table)


def test_budgets_interpolate_and_refuse_what_is_out_of_reach() -> None:
    table, routers = make_table(60), make_routers()
    pyramid = replace(PYRAMID, budgets=budget_table(routers, table))
    assert pyramid.trade_off_for(1.0) == 0.0
    for row in pyramid.budgets:
        assert pyramid.trade_off_for(row.fraction) == pytest.approx(row.trade_off)
    with pytest.raises(ValueError, match="out of reach"):
        pyramid.trade_off_for(pyramid.budgets[-1].fraction - 0.01)
    dear = replace(PYRAMID, budgets=(Budget(1.001, 0.0, 0.0), Budget(0.9, 0.5, 0.1)))  # routers cost a little
    assert dear.trade_off_for(1.0) == 0.0
    for nonsense in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            pyramid.trade_off_for(nonsense)
