"""Healing: an adapter on the layers after the first site learns to answer from few tokens as from all of them.

Teacher and student are one model, unless another one is given as the teacher: its pyramid and its adapter are switched
off for the one, on for the other. Every sample takes the route that its routers choose, for a budget that is drawn for
every forward pass: routes that nobody takes, which have lost what an answer needs, would only do harm. Some passes take
the full route, so that the unreduced model stays what it was, or becomes what another teacher is. Source: ours.
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
from dpn_cli.modeling.call import changed_call
from dpn_cli.modeling.state import Choice, PyramidState
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.processes import ALONE, Processes
from dpn_cli.pyramid.calibration_recipe import HealRecipe
from dpn_cli.pyramid.config import PyramidConfig

HELD_OUT = (8, 256)  # samples that judge, an eighth of all: none where that is fewer than the first, at most the second
LOOKS_PER_HELD_OUT = 2
BUDGETS = 9  # that are drawn from


def heal(
    model: PyramidGenerationMixin,
    examples: Sequence[Example],
    has_labels: Sequence[bool],
    recipe: HealRecipe,
    *,
    trade_offs: Sequence[float],
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
        model: with fitted routers and without an adapter, in eval mode.
        examples: none of those that the result is judged by.
        has_labels: Whether the answers come from the data rather than from the teacher, per example.
        recipe: Training recipe with method `lora`.
        trade_offs: the λ to draw from, which the routers choose with.
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
            is_full = draw.random.random() < recipe.full_share
            return heal_loss(model, trunk, 0.0 if is_full else draw.random.choice(trade_offs), recipe)

        return loss_of

    divergence_alone = loss_on(held, recipe.model_copy(update={"ce_weight": 0.0}))
    passes = math.ceil(LOOKS_PER_HELD_OUT * len(held) / recipe.batch_size)
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


def trade_offs_around(pyramid: PyramidConfig, budget: float, spread: float) -> list[float]:
    """Return the λ of budgets around one that a calibrated pyramid can spend.

    Args:
        pyramid: Pyramid with a budget table.
        budget: the middle of the budgets.
        spread: Largest distance from it, as a share of it.
    """
    cheapest = pyramid.budgets[-1].fraction
    steps = torch.linspace(1 - spread, 1 + spread, BUDGETS).tolist()
    return [pyramid.trade_off_for(min(max(budget * step, cheapest), 1.0)) for step in steps]


def heal_loss(model: PyramidGenerationMixin, trunk: Trunk, trade_off: float, recipe: HealRecipe) -> torch.Tensor:
    """Return the bounded KL to the teacher plus, where tokens are reduced, the weighted cross-entropy to the labels.

    The bound, 1 - exp(-KL), is about KL where that is small. Where a route has lost what an answer needs, KL is large,
    and no adapter can mend it: unbounded, these answers would outweigh those that can be mended, and do them harm.

    Args:
        model: Model with fitted routers.
        trunk: the batch.
        trade_off: λ that the routers choose with; 0 for the full route.
        recipe: how to weigh.
    """
    text_model: Any = model.text_model

    def follow(state: PyramidState, site: int) -> Choice:
        if trade_off == 0:
            return text_model.take(state, site, [0] * len(state.grids))
        with torch.no_grad(), changed_call(text_model, trade_off=trade_off):
            return text_model.choose(state, site)

    teacher = teacher_logits(model, trunk)
    student = student_logits(model, trunk, follow)
    loss = 1 - (-divergence(student, teacher, recipe.temperature)).exp()
    if trade_off:
        labelled = trunk.has_labels[trunk.answers[0]]
        loss = loss + recipe.ce_weight * labelled * F.cross_entropy(student, trunk.targets, reduction="none")
    return trunk.mean(loss)
