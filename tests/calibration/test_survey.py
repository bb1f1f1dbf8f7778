"""The survey on made-up measurements: it finds the routes that an oracle wants, and drops what none of them uses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_cli.calibration.rollout import RouteTable, RouteTree, plan_batches
from dpn_cli.calibration.survey import Candidates, pruned, survey
from dpn_cli.pyramid.calibration_recipe import SurveyRecipe
from dpn_cli.pyramid.config import PyramidConfig, Route, Site
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.experts import KEEP, Expert
from dpn_cli.pyramid.route import format_route
from dpn_cli.pyramid.shape import DecoderShape

SHAPE = DecoderShape(8, 64, 128, 4, 4, 16, 300)
MENU = tuple(map(Expert.parse, ("keep", "pool:2x2", "diverse:0.25", "exit")))
PYRAMID = PyramidConfig(sites=tuple(Site(layer, MENU) for layer in (-1, 2, 5)), min_visual_tokens=4)
GRID = (12, 12)
RECIPE = SurveyRecipe(samples=12, routes=6, width=5)


def made_up(tree: RouteTree, count: int) -> RouteTable:
    """Return a table where pooling hurts all, `diverse` nobody, and leaving hurts odd samples before the last site."""
    odd = torch.arange(count) % 2 == 1
    columns = []
    for route in tree.routes:
        loss = torch.zeros(count)
        for site, k in enumerate(route):
            loss += (k == 1) * 2.0 + (k == 3) * torch.where(odd, 3.0, 0.0) * (site < 2)
        columns.append(loss)
    distortion = torch.stack(columns, dim=1)
    fraction = torch.tensor([flops_fraction(SHAPE, PYRAMID, route, [GRID], 12) for route in tree.routes])
    nothing = torch.zeros(count, 0, 1, 1)
    return RouteTable(
        tree, nothing, distortion >= 0, distortion, (distortion < 0.1).float(), fraction.expand(count, -1)
    )


def test_it_finds_what_fits_and_never_offers_what_hurts_everybody() -> None:
    asked: list[tuple[int, int]] = []

    def measure(title: str, tree: RouteTree, count: int) -> RouteTable:
        asked.append((len(tree.routes), count))
        assert tree.prefixes == () and tree.routes[0] == (0, 0, 0)
        return made_up(tree, count)

    found = survey(PYRAMID, [(GRID,)] * 60, measure, RECIPE, 0.5, [(3, 0, 0)])
    names = {format_route(route, found.pyramid.sites) for route in found.pyramid.routes or ()}
    assert not any("pool" in name for name in names), "a better one is as cheap"
    assert found.pyramid.routes is not None and found.pyramid.routes[0] == found.pyramid.full_route
    assert len(found.pyramid.routes) == len(found.chosen) <= RECIPE.routes
    table = made_up(RouteTree(tuple(found.finalists.routes[i] for i in found.chosen), ()), 60)
    lossless = table.fraction[0][(table.distortion == 0).all(0)].min()
    easy = table.fraction[0][table.distortion[0] == 0].min()
    assert lossless < 0.3 and easy < lossless, "safe for all, and cheaper where that does no harm"
    assert asked[-1][1] == 4 * RECIPE.samples and {count for _, count in asked[:-1]} == {RECIPE.samples}
    assert sum(routes for routes, _ in asked[:-1]) < len(list(PYRAMID.routes_for([GRID])))
    after_exit = [route[route.index(3) + 1 :] for route in found.tried.routes if 3 in route]
    assert after_exit and not any(map(any, after_exit)), "there is nothing left to reduce"


def test_the_budget_stays_within_reach_though_no_oracle_would_want_it() -> None:
    """All routes that cost less than half are useless here, and one of them is offered all the same."""

    def measure(title: str, tree: RouteTree, count: int) -> RouteTable:
        table = made_up(tree, count)
        useless = torch.where(table.fraction < 0.5, 50.0, 0.0)
        return replace(table, distortion=table.distortion + useless)

    cheapest = (3, 0, 0)
    for budget in (0.3, 0.12):
        found = survey(PYRAMID, [(GRID,)] * 60, measure, RECIPE, budget, [cheapest])
        fractions = [flops_fraction(SHAPE, found.pyramid, r, [GRID], 12) for r in found.pyramid.routes or ()]
        assert min(fractions) <= budget and len(fractions) <= RECIPE.routes


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9999), st.integers(2, 8))
def test_the_chosen_set_holds_a_safe_route_of_every_price_and_more_routes_never_cost_more(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    routes = tuple((i, 0) for i in range(12))
    fraction = torch.rand(1, 12, generator=generator).expand(20, -1).clone()
    distortion = torch.rand(20, 12, generator=generator) * (1 - fraction) * 4
    fraction[:, 0], distortion[:, 0] = 1, 0
    found = Candidates(routes, distortion, fraction, torch.ones(20, 12))

    def oracle(chosen: list[int], trade_off: float) -> float:
        return (distortion[:, chosen] + trade_off * fraction[:, chosen]).min(1).values.mean().item()

    chosen, more = found.best_set(size), found.best_set(size + 3)
    assert chosen[0] == 0 and len(set(chosen)) == len(chosen) <= size
    assert more[: len(chosen)] == chosen, "greedy"
    assert all(oracle(more, trade_off) <= oracle(chosen, trade_off) for trade_off in (0.01, 0.3, 5.0))


def test_where_an_oracle_gains_nothing_the_safe_routes_of_all_prices_are_taken() -> None:
    """All samples lose the same on a route; one sample is not offered the safest, which counts for the others alone."""
    fraction = torch.linspace(1, 0.1, 40).expand(8, -1).clone()
    distortion = (1 - fraction) * 3
    distortion[0, 35], fraction[0, 35] = torch.inf, 1
    distortion[1:, 35] = 0.001
    found = Candidates(tuple((i, 0) for i in range(40)), distortion, fraction, torch.ones(8, 40))
    chosen = found.best_set(12)
    assert len(chosen) == 12 and 35 in chosen


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=6))
def test_a_pruned_pyramid_offers_the_same_routes_by_name(routes: list[Route]) -> None:
    routes = [route for route in [PYRAMID.full_route, *routes] if PYRAMID.can_walk(route, [GRID])]
    small = pruned(PYRAMID, routes).checked()
    kept = {site.after_layer for site in small.sites}

    def names(pyramid: PyramidConfig, route: Route) -> list[str]:
        pairs = zip(pyramid.sites, pyramid.experts(route), strict=True)
        return [f"{site.after_layer} {expert}" for site, expert in pairs if expert != KEEP]

    assert sorted(names(small, route) for route in small.routes or ()) == sorted(
        names(PYRAMID, route) for route in dict.fromkeys(routes)
    )
    used = {site.after_layer for route in routes for site, k in zip(PYRAMID.sites, route, strict=True) if k}
    assert kept == used or (not used and len(kept) == 1)
    for route in routes:
        renamed = next(r for r in small.routes or () if names(small, r) == names(PYRAMID, route))
        assert small.walk(renamed, [GRID])[-1] == PYRAMID.walk(route, [GRID])[-1]


def test_samples_run_together_only_down_routes_that_all_of_them_are_offered() -> None:
    tree = RouteTree(((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)), ())
    small = replace(PYRAMID, min_visual_tokens=20)
    batches = plan_batches(tree, small, [(GRID,), ((6, 6),), (GRID,), (GRID,)], batch_size=2, num_routes=None)
    assert [(batch.rows, len(batch.routes)) for batch in batches] == [((0, 2), 4), ((3,), 4), ((1,), 2)]


def test_a_route_that_a_sample_is_not_offered_costs_it_the_most() -> None:
    table = made_up(RouteTree(((0, 0, 0), (2, 0, 0)), ()), 4)
    table.distortion[1, 1] = torch.nan
    assert Candidates.of(table).distortion[1, 1] == torch.inf
    with pytest.raises(ValueError, match="first route"):
        replace(PYRAMID, routes=((1, 0, 0),), router=replace(PYRAMID.router, output="routes")).checked()
