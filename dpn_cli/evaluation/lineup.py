"""Who is measured in `dpn bench`: the pyramid at every budget, and others that spend what it spends."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from dpn_cli.errors import UsageError
from dpn_cli.evaluation.baselines import fit_baselines
from dpn_cli.evaluation.baselines.baseline import TOLERANCE, Baseline, Prompt, full_flops, unequal
from dpn_cli.evaluation.baselines.routes import (
    FixedRoute,
    GivenRoutes,
    Original,
    Routed,
    routes_that_spend,
    walked_by_all,
)
from dpn_cli.evaluation.latency import Inputs, prompts_of
from dpn_cli.evaluation.spending import Spending
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.reach import cheapest_fraction


@dataclass(frozen=True)
class Lineup:
    """Who is measured, and what a reader should know about it.

    Attributes:
        methods: Methods to measure, by their names in tables.
        spendings: Mean FLOPs fraction that the pyramid spends at every budget.
        remarks: Sentences that a reader of the figures should know.
    """

    methods: Mapping[str, Baseline]
    spendings: Sequence[Spending]
    remarks: Sequence[str]


def line_up(
    model: PyramidGenerationMixin,
    batches: Sequence[Inputs],
    budgets: Sequence[float],
    routes: Sequence[Route],
    against: Sequence[str],
    has_data: bool,
) -> Lineup:
    """Let the pyramid spend every budget, and fit the others to what it spends on the same prompts.

    On real prompts the routers choose. Synthetic ones tell routers nothing: routes that spend the budget are given,
    and the routers run so that their time counts.

    Args:
        model: the model, in eval mode.
        batches: the batches to measure, every sample with an image; all the same if prompts are synthetic.
        budgets: mean fractions of the prefill FLOPs; with neither budgets nor routes, the pyramid spends what it is set
            to.
        routes: routes to measure too, each the same for all samples.
        against: names from `BASELINES` to compare with.
        has_data: whether the prompts are real.

    Raises:
        UsageError: if a budget or a route is not possible with these prompts.
    """
    pyramid = model.pyramid
    different = batches if has_data else batches[:1]
    prompts = [prompt for batch in different for prompt in prompts_of(model, batch)]
    _validate(model, prompts, () if has_data else budgets)
    fixed = walked_by_all(pyramid, routes, prompts)
    entries: list[tuple[str, float | None, Routed]]
    entries = [(f"{Routed.name} at {budget:g}", budget, Routed(budget)) for budget in dict.fromkeys(budgets)]
    if not budgets and not routes:
        entries = [(Routed.name, pyramid.budget, Routed())]
    methods: dict[str, Baseline] = {Original.name: Original()}
    spendings: list[Spending] = []
    remarks: list[str] = []
    for name, budget, routed in entries:
        dpn = routed if has_data or budget is None else _given(model, prompts, budget)
        methods[name] = dpn
        if budget is None:  # no limit: there is nothing to meet
            continue
        fractions = _spent(model, dpn, different)
        spendings.append(Spending(budget, fmean(fractions), len(fractions)))
        if isinstance(dpn, GivenRoutes):
            remarks.append(_given_routes(name, dpn, pyramid, spendings[-1]))
        baselines, said = _baselines(model, prompts, fractions, budget, against)
        methods |= baselines
        remarks += said
    return Lineup(methods | {each.label: each for each in fixed}, spendings, remarks)


def _validate(model: PyramidGenerationMixin, prompts: Sequence[Prompt], budgets: Sequence[float]) -> None:
    """Check that prompts can spend as little as some budgets.

    Raises:
        UsageError: if one cannot be reached.
    """
    lengths = [(prompt.grids, prompt.text_tokens) for prompt in prompts]
    cheapest = cheapest_fraction(model.text_model.shape, model.pyramid, lengths)
    for budget in budgets:
        if budget < cheapest - TOLERANCE:
            raise UsageError(
                f"budget {budget:g} is out of reach of these synthetic prompts, whose cheapest routes spend "
                f"{cheapest:.3f}: ask for more, adapt the prompts to your data (--text-tokens, --images, "
                "--image-size), or give --data"
            )


def _given(model: PyramidGenerationMixin, prompts: Sequence[Prompt], budget: float) -> GivenRoutes:
    """Return the pyramid with the routes that spend a budget on a batch."""
    shape = model.text_model.shape
    return GivenRoutes(given=routes_that_spend(shape, model.pyramid, prompts, budget))


def _given_routes(name: str, dpn: GivenRoutes, pyramid: PyramidConfig, spending: Spending) -> str:
    """Say that routes are given, and which."""
    experts = "; ".join(FixedRoute(pyramid, route).experts for route in dict.fromkeys(dpn.given))
    return (
        f"{name}: synthetic prompts tell routers nothing, so the routes nearest to {spending.asked:g} are set "
        f"({experts}: {spending.spent:.3f} of the prefill FLOPs); the routers run too, so that their time counts. With "
        "--data the routers choose."
    )


def _spent(model: PyramidGenerationMixin, dpn: Routed, batches: Sequence[Inputs]) -> list[float]:
    """Return the FLOPs fraction of every sample."""
    fractions = []
    with dpn.applied(model):
        for inputs in batches:
            here = {name: values.to(model.device) for name, values in inputs.items()}
            model.generate(**here, max_new_tokens=1, do_sample=False, num_beams=1)
            fractions += dpn.fractions(model, prompts_of(model, inputs))
    return fractions


def _baselines(
    model: PyramidGenerationMixin,
    prompts: Sequence[Prompt],
    fractions: Sequence[float],
    budget: float,
    names: Sequence[str],
) -> tuple[dict[str, Baseline], list[str]]:
    """Return other methods at the pyramid's total of FLOPs, and what there is to say about them."""
    shape = model.text_model.shape
    full = [full_flops(shape, prompt) for prompt in prompts]
    spent = _total(fractions, full)
    weights: Counter[Prompt] = Counter()
    for prompt, flops in zip(prompts, full, strict=True):
        weights[prompt] += flops
    methods: dict[str, Baseline] = {}
    remarks: list[str] = []
    fits = fit_baselines(names, model, spent, lambda each, spends: [each.fit(shape, weights, spends)])
    for name, fitted, refusal in fits:
        if refusal:
            remarks.append(f"Left out, {name} at {budget:g}: {refusal}")
        for baseline in fitted:
            methods[f"{baseline.label} at {budget:g}"] = baseline
            if remark := unequal(baseline.label, _total(baseline.fractions(model, prompts), full), spent):
                remarks.append(f"Not equal, at {budget:g}: {remark}")
    return methods, remarks


def _total(fractions: Sequence[float], full: Sequence[int]) -> float:
    """Return the fraction of all FLOPs, where every prompt has a fraction of its own."""
    return sum(fraction * flops for fraction, flops in zip(fractions, full, strict=True)) / sum(full)
