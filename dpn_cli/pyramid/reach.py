"""Which budgets a pyramid can reach on given samples: their lengths tell, before anything is measured. No torch."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from dpn_cli.errors import RecipeError, UsageError
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.experts import Grid
from dpn_cli.pyramid.recipe_files import available_recipes, load_recipe
from dpn_cli.pyramid.shape import DecoderShape

Length = tuple[tuple[Grid, ...], int]  # a sample's visual grids, and the text tokens of its prompt


def cheapest_fraction(shape: DecoderShape, pyramid: PyramidConfig, lengths: Sequence[Length]) -> float:
    """Return the mean FLOPs fraction that routing reaches when λ outweighs every distortion."""
    total = sum(count * _cheapest(shape, pyramid, *length) for length, count in Counter(lengths).items())
    return total / len(lengths)


def length_record(shape: DecoderShape, pyramid: PyramidConfig, lengths: Sequence[Length]) -> dict[str, Any]:
    """Return for config.json one length that stands for all: its cheapest route costs what theirs do in the mean.

    So what `dpn inspect` shows for a sample of this length agrees with the budget table, which is of all of them.
    """
    mean = cheapest_fraction(shape, pyramid, lengths)
    distances = {length: abs(_cheapest(shape, pyramid, *length) - mean) for length in dict.fromkeys(lengths)}
    grids, _ = min(distances, key=lambda length: distances[length])
    texts = range(min(text for _, text in lengths), max(text for _, text in lengths) + 1)

    def cost(text_tokens: int) -> float:
        return _cheapest(shape, pyramid, grids, text_tokens)

    above = bisect_left(texts, mean, key=cost)  # the more text there is, the less is saved
    text_tokens = min(texts[max(above - 1, 0) : above + 1], key=lambda text: abs(cost(text) - mean))
    return {"text_tokens": text_tokens, "grids": [list(grid) for grid in grids]}


def typical_length(pyramid: PyramidConfig) -> Length | None:
    """Return what `length_record` has recorded; None where there is no such record, as in older checkpoints."""
    record = pyramid.calibration
    with suppress(KeyError, TypeError, ValueError):
        grids = tuple((int(height), int(width)) for height, width in record["grids"])
        if record["text_tokens"] >= 1 and min(min(grid) for grid in grids) >= 1:
            return grids, int(record["text_tokens"])
    return None


def validate_in_table(budgets: Iterable[float], pyramid: PyramidConfig) -> None:
    """Check that a pyramid's budget table has all budgets.

    Raises:
        UsageError: for the first that it has not.
    """
    try:
        for budget in budgets:
            pyramid.trade_off_for(budget)
    except ValueError as error:
        raise UsageError(str(error)) from None


def validate_budget(
    recipe: CalibrationRecipe, shape: DecoderShape, pyramid: PyramidConfig, lengths: Sequence[Length]
) -> None:
    """Check that the budget of a calibration is within reach.

    Args:
        recipe: asks for it.
        shape: Shape of the decoder.
        pyramid: The checkpoint's pyramid.
        lengths: Prompt lengths of the samples on which the budget is to be met.

    Raises:
        UsageError: naming the cheapest budget, and the recipe that reaches the wanted one.
    """
    cheapest = cheapest_fraction(shape, pyramid, lengths)
    if recipe.budget >= cheapest:
        return
    reach = _reach_of_recipes(recipe.objective, shape, lengths)
    name = min(reach, key=lambda each: reach[each])
    advice = (
        f"ask for more, or convert again with --recipe {name} (reaches {reach[name]:.3f})"
        if reach[name] <= recipe.budget
        else f"ask for more; no recipe that comes with dpn reaches it (the nearest is {name}, {reach[name]:.3f})"
    )
    raise UsageError(
        f"budget {recipe.budget:g} is out of reach: this pyramid's cheapest is {cheapest:.3f} on these data; {advice}"
    )


def cheapest_route(shape: DecoderShape, pyramid: PyramidConfig, grids: Sequence[Grid], text_tokens: int) -> Route:
    """Return the cheapest route of those that are listed, else the one that takes the cheapest expert at every site.

    The latter is what routers that choose expert by expert reach.
    """

    def fraction(route: Route) -> float:
        return flops_fraction(shape, pyramid, route, grids, text_tokens)

    if pyramid.routes is not None:
        return min(pyramid.routes_for(grids), key=fraction)
    prefix: Route = ()
    while len(prefix) < len(pyramid.sites):
        cheapest = min(pyramid.options(prefix, grids), key=lambda option: fraction(option.route))
        prefix = (*prefix, cheapest.expert)
    return prefix


def _cheapest(shape: DecoderShape, pyramid: PyramidConfig, grids: Sequence[Grid], text_tokens: int) -> float:
    """Return the fraction that the cheapest route takes."""
    return flops_fraction(shape, pyramid, cheapest_route(shape, pyramid, grids, text_tokens), grids, text_tokens)


def _reach_of_recipes(objective: str, shape: DecoderShape, lengths: Sequence[Length]) -> dict[str, float]:
    """Return the cheapest fraction of every shipped recipe that calibrates in the same way and fits the decoder."""
    reach = {}
    for name in available_recipes():
        recipe = load_recipe(name)
        try:
            pyramid = recipe.pyramid_config(shape.num_layers)
            pyramid = pyramid.with_all_routes() if recipe.surveys else pyramid
        except RecipeError:
            continue
        if recipe.calibration.objective == objective:
            reach[name] = cheapest_fraction(shape, pyramid, lengths)
    return reach
