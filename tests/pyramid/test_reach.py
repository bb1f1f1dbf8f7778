"""The cheapest reachable budget, from lengths alone, and who reaches a cheaper one."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_cli.errors import UsageError
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.reach import Length, cheapest_fraction, length_record, typical_length, validate_budget
from dpn_cli.pyramid.recipe_files import load_recipe
from dpn_cli.pyramid.shape import DecoderShape

LLAVA_7B = DecoderShape(32, 4096, 11008, 32, 32, 128, 32064)
LENGTHS: list[Length] = [(((24, 24),), 60), (((24, 24), (24, 24)), 40)]


def pyramid_of(recipe: str) -> PyramidConfig:
    return load_recipe(recipe).pyramid_config(LLAVA_7B.num_layers).with_all_routes()


def refusal(recipe: str, budget: float, lengths: list[Length] = LENGTHS) -> str:
    pyramid = pyramid_of(recipe)
    with pytest.raises(UsageError) as caught:
        validate_budget(CalibrationRecipe(budget=budget), LLAVA_7B, pyramid, lengths)
    return str(caught.value)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 900)), min_size=1, max_size=4))
def test_the_cheapest_rate_of_every_site_is_the_cheapest_route(
    sizes: list[tuple[int, int]],
) -> None:
    pyramid = load_recipe("llava-1.5-7b-paper").pyramid_config(LLAVA_7B.num_layers)
    lengths: list[Length] = [(((24, 24),) * images, text) for images, text in sizes]
    best = [
        min(flops_fraction(LLAVA_7B, pyramid, route, grids, text) for route in pyramid.routes_for(grids))
        for grids, text in lengths
    ]
    assert cheapest_fraction(LLAVA_7B, pyramid, lengths) == pytest.approx(sum(best) / len(best), abs=1e-12)


def test_the_recipe_that_reaches_the_budget_is_named_with_what_it_reaches() -> None:
    other = pyramid_of("aggressive")
    reached = cheapest_fraction(LLAVA_7B, other, LENGTHS)
    assert reached < 0.15
    message = refusal("llava-1.5-7b-paper", 0.3)
    assert f"convert again with --recipe aggressive (reaches {reached:.3f})" in message
    validate_budget(CalibrationRecipe(budget=0.3), LLAVA_7B, other, LENGTHS)


def test_where_no_recipe_reaches_the_budget_it_says_so() -> None:
    assert "no recipe that comes with dpn reaches it (the nearest is aggressive, " in refusal("llava-1.5-7b", 0.05)


@pytest.mark.parametrize(
    "lengths",
    [LENGTHS, [(((24, 24),), 10), (((24, 24),), 500)], [(((24, 24),), 33)], [(((12, 12),) * 3, 9), LENGTHS[0]]],
)
def test_one_length_stands_for_all(lengths: list[Length]) -> None:
    pyramid = load_recipe("llava-1.5-7b").pyramid_config(LLAVA_7B.num_layers)
    record = length_record(LLAVA_7B, pyramid, lengths)
    stored = PyramidConfig.from_dict(json.loads(json.dumps(replace(pyramid, calibration=record).to_dict())))
    typical = typical_length(stored)
    assert typical is not None
    mean = cheapest_fraction(LLAVA_7B, pyramid, lengths)
    assert cheapest_fraction(LLAVA_7B, pyramid, [typical]) == pytest.approx(mean, abs=2e-3)
    assert min(text for _, text in lengths) <= typical[1] <= max(text for _, text in lengths)


def test_a_long_prompt_costs_what_no_pooling_saves() -> None:
    assert "budget 0.5 is out of reach" in refusal("llava-1.5-7b", 0.5, [(((24, 24),), 3000)])
