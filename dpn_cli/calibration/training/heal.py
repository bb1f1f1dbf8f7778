"""Healing: an adapter on the layers after the first site learns to answer from pooled tokens as from all of them.

Teacher and student are one model, unless another one is given as the teacher: its pyramid and its adapter are switched
off for the one, on for the other. Every forward pass takes one route, drawn around the budget; some take the full
route, so that the unpooled model stays what it was, or becomes what another teacher is.
"""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dpn_cli.calibration.passes import Trunk, run_trunk, student_logits, teacher_logits
from dpn_cli.calibration.teacher import Teacher
from dpn_cli.calibration.training.loop import Draw, Draws, Judge, TrainingReport, train
from dpn_cli.data.encoding import Example
from dpn_cli.inference.adapter import add_adapter, remove_adapter
from dpn_cli.inference.scoring import divergence
from dpn_cli.modeling.state import Choice, PyramidState
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.processes import ALONE, Processes
from dpn_cli.pyramid.config import Route
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.recipe import HealRecipe

HELD_OUT = (8, 64)  # samples that judge, an eighth of all: none where that is fewer than the first, at most the second
ROUTES_PER_HELD_OUT = 2


def heal(
    model: PyramidGenerationMixin,
    examples: Sequence[Example],
    has_labels: Sequence[bool],
    recipe: HealRecipe,
    *,
    budget: float,
    pad_token_id: int,
    seed: int,
    state: Path | None = None,
    processes: Processes = ALONE,
    advance: Callable[[int], None] = lambda steps: None,
    other: Teacher | None = None,
) -> TrainingReport:
    """Train an adapter; the model carries it from then on, all else of it is untouched.

    A part of the samples only judges. What did best on it is kept: an adapter, or none without a clear gain.

    Args:
        model: converted, without an adapter, in eval mode.
        examples: none of those that the result is judged by.
        has_labels: Whether the answers come from the data rather than from the teacher, per example.
        recipe: Training recipe with method `lora`.
        budget: mean fraction of the prefill FLOPs around which routes are drawn.
        pad_token_id: fills up the shorter samples of a batch.
        seed: Random seed for sampling.
        state: a folder; a run that was killed goes on from there.
        processes: share the forward passes of every step.
        advance: called with the number of steps done.
        other: Teacher that is another model; None for the model itself.

    Raises:
        DpnError: if the loss or its gradient is not a finite number.
        MissingExtraError: if peft is not installed.
    """
    parameters = add_adapter(model, recipe.rank, recipe.alpha, recipe.target_modules, seed)
    held, learned = _split(len(examples), seed)

    def loss_on(some: Sequence[int], recipe: HealRecipe) -> Callable[[Draw], torch.Tensor]:
        def loss_of(draw: Draw) -> torch.Tensor:
            rows = [some[i] for i in draw.rows]
            trunk = run_trunk(model, [examples[i] for i in rows], [has_labels[i] for i in rows], pad_token_id, other)
            return heal_loss(model, trunk, draw_route(model, trunk.state, budget, recipe, draw.random), recipe)

        return loss_of

    divergence_alone = loss_on(held, recipe.model_copy(update={"ce_weight": 0.0}))
    passes = math.ceil(ROUTES_PER_HELD_OUT * len(held) / recipe.batch_size)
    judge = Judge(divergence_alone, Draws(len(held), recipe, seed), passes, recipe.judge_every) if held else None
    draws = Draws(len(learned), recipe, seed)
    report = train(model, parameters, loss_on(learned, recipe), draws, state, processes, advance, judge)
    if report.kept == 0:
        remove_adapter(model)
    return report


def _split(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the samples that judge, and those to learn from."""
    order = random.Random(f"{seed}, held out").sample(range(count), count)
    least, most = HELD_OUT
    held = min(most, count // 8) if count // 8 >= least else 0
    return order[:held], order[held:]


def heal_loss(model: PyramidGenerationMixin, trunk: Trunk, route: Route, recipe: HealRecipe) -> torch.Tensor:
    """Return the bounded KL to the teacher plus, where the route pools, the weighted cross-entropy to the labels.

    The bound, 1 - exp(-KL), is about KL where that is small. Where a route has lost what an answer needs, KL is large,
    and no adapter can mend it: unbounded, these answers would outweigh those that can be mended, and do them harm.
    """
    text_model: Any = model.text_model

    def follow(state: PyramidState, site: int) -> Choice:
        return text_model.take(state, site, [route[site] if grids else 0 for grids in state.grids])

    teacher = teacher_logits(model, trunk)
    student = student_logits(model, trunk, follow)
    loss = 1 - (-divergence(student, teacher, recipe.temperature)).exp()
    if any(route):
        labelled = trunk.has_labels[trunk.answers[0]]
        loss = loss + recipe.ce_weight * labelled * F.cross_entropy(student, trunk.targets, reduction="none")
    return trunk.mean(loss)


def draw_route(
    model: PyramidGenerationMixin,
    state: PyramidState,
    budget: float,
    recipe: HealRecipe,
    rng: random.Random,
) -> Route:
    """Draw the route of a batch: the full one now and then, else any whose FLOPs are around the budget.

    Args:
        model: offers the routes.
        state: the batch before the first site.
        budget: the middle of the fractions of FLOPs to draw from.
        recipe: Spread of the budgets, and share of the full route.
        rng: Random generator.
    """
    pyramid, shape = model.pyramid, model.text_model.shape
    samples = [(grids, text) for grids, text in zip(state.image_grids, state.text_tokens, strict=True) if grids]
    if rng.random() < recipe.full_share or not samples:
        return pyramid.full_route
    offered = set.intersection(*(set(pyramid.routes_for(grids)) for grids in {grids for grids, _ in samples}))

    def distance(route: Route) -> float:
        fractions = [flops_fraction(shape, pyramid, route, grids, text) for grids, text in samples]
        return abs(sum(fractions) / len(fractions) - budget)

    distances = {route: distance(route) for route in sorted(offered - {pyramid.full_route})}
    if not distances:
        return pyramid.full_route
    reach = max(recipe.budget_spread, min(distances.values()))
    return rng.choice([route for route, away in distances.items() if away <= reach])
