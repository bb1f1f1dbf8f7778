"""Calibration as one call: samples in, fitted routers and a budget table in the checkpoint's folder out."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpn_cli.calibration.budgets import budget_table
from dpn_cli.calibration.cases import answer_both, ranked
from dpn_cli.calibration.fitting import fit_routers, held_out_objective
from dpn_cli.calibration.job import Job, open_job, split_rows, start_afresh
from dpn_cli.calibration.policy import Policy
from dpn_cli.calibration.predictors import learn_predictors
from dpn_cli.calibration.reporting.report import Report
from dpn_cli.calibration.rollout import RouteTable, RouteTree, measure, plan_batches
from dpn_cli.calibration.samples import CalibrationData
from dpn_cli.calibration.settings import Only, recipe_name
from dpn_cli.calibration.state import drop_state
from dpn_cli.calibration.store import Claim, calibrating, save_budgets, save_calibration, sweep
from dpn_cli.calibration.survey import FINAL_SAMPLES, Tried, survey
from dpn_cli.calibration.training.tuning import tune
from dpn_cli.data.encoding import Encoded, expected_grids
from dpn_cli.data.options import DataOptions
from dpn_cli.data.samples import Sample
from dpn_cli.inference.provenance import provenance
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.processes import Processes
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.experts import Grid
from dpn_cli.pyramid.reach import cheapest_route, length_record
from dpn_cli.reporter import SILENT, Reporter


def calibrate(
    folder: Path,
    data: DataOptions,
    recipe: CalibrationRecipe,
    reporter: Reporter = SILENT,
    *,
    teacher: str | None = None,
    restart: bool = False,
    processes: Processes | None = None,
    only: Only | None = None,
) -> Report | None:
    """Fit the routers of a converted checkpoint and store them, the budget table and a report in its folder.

    The base weights are not touched. Measurements are kept as they are made, so that the same call goes on after a
    kill. A budget below what the pyramid reaches is refused before anything else is written.

    Args:
        folder: Checkpoint that `dpn convert` wrote.
        data: the samples to calibrate on.
        recipe: samples, routes, seeds and the budget.
        reporter: Reporter of messages and of the progress.
        teacher: folder, alias or hub id of another checkpoint with the same tokenizer that answers and is measured
            against; None for the model itself without its pyramid.
        restart: drop what an unfinished calibration has measured.
        processes: Processes that calibrate together, each with this call; by default those that a launcher has started.
        only: `budgets` leaves routers and weights as an earlier calibration has left them, and solves λ and the budget
            table, so that budgets are met on this data; `heal` keeps the experts and the routes, heals the model for
            what its routers choose, and fits them again; where healing does not help, nothing is written.

    Returns:
        The report; None in all processes but the main one, which alone fits and writes, and where nothing is written.

    Raises:
        DataError: if there are too few samples, or bad ones.
        CheckpointError: if the checkpoint cannot be calibrated, or the teacher cannot teach it.
        UsageError: if the budget is out of reach, the checkpoint's route is fixed, or an unfinished calibration
            differs from this one.
    """
    processes = processes or Processes.join(reporter.note)
    with _in_charge(folder, processes) as claim:
        job, read = open_job(folder, data, recipe, reporter, teacher, restart, processes, only)
        run = _solve_budgets if only == "budgets" else _calibrate
        return run(job, read, claim, data.name)


@contextmanager
def _in_charge(folder: Path, processes: Processes) -> Iterator[Claim | None]:
    """Keep other runs from a checkpoint; when the block ends well, sweep what is no longer needed in it."""
    with ExitStack() as held:
        with processes.as_one():
            claim = held.enter_context(calibrating(folder)) if processes.is_main else None
        yield claim
        if claim is not None:
            if claim.use.is_alone():
                sweep(claim)
            drop_state(folder)


def _calibrate(job: Job, read: CalibrationData, claim: Claim | None, data: str) -> Report | None:
    """Answer, measure and fit, heal and measure again if asked, and save; or only what follows the first fit."""
    recipe, processes = job.recipe, job.processes
    asked = read.asked
    texts = [(sample, True) for sample in read.samples if not sample.images and sample.is_answered]
    samples = _answer(job, asked)
    held, fitted, further = split_rows(read, recipe)
    if not job.only:
        learn_predictors(job, [samples[i] for i in further + fitted])
    tried = () if job.candidates is None else _survey(job, job.candidates, [samples[i] for i in fitted])
    paper = recipe.objective == "paper"  # then the routers are trained, and only what they are judged by is measured
    measured = [samples[i] for i in (held if paper else held + fitted)]
    if not paper and not job.only:
        table, grids = _learn(job, measured, len(held))
    healing = (fitted + further)[: max(len(fitted), recipe.heal.samples or 0)]  # the others are the predictors' alone
    learned = [*((samples[i], asked[i].is_answered) for i in healing), *texts]
    state = job.state.folder if job.state else None
    tuned = tune(job.model, job.processor, learned, recipe, state, processes, job.reporter, job.other)
    if job.only and not job.model.is_adapted:
        job.reporter.note("The checkpoint stays as it was.")
        return None
    if paper:
        table, grids = _measure(job, measured, len(held))
    elif job.only or job.model.is_adapted:
        table, grids = _learn(job, measured, len(held), again=not job.only)
    if claim is None:
        return None
    held_table = table.part(range(len(held)))
    pyramid = _solve(job, held_table) if paper else job.model.pyramid
    objective = held_out_objective(job.model.text_model.routers, held_table.loss)
    settings = {
        "data": data, "data_digest": read.measured.digest, "recipe": recipe_name(claim.folder),
        "teacher": job.teacher.name,
        **recipe.model_dump(mode="json", exclude={"prompts", *recipe.unused_sections}),
        "objective_over_best_fixed": objective, "training": tuned and tuned.summary(),
        **length_record(job.model.text_model.shape, pyramid, job.lengths),
    }  # fmt: skip
    report = _report(job, held_table, pyramid, [asked[i] for i in held], grids[: len(held)], settings)
    report = replace(report, tried=tried)
    with job.reporter.waiting("writing the report"):
        save_calibration(claim, job.model, report)
    return report


def _answer(job: Job, samples: Sequence[Sample]) -> list[Sample]:
    """Answer the samples that have no answers with the teacher's own, greedily."""
    size, answers = job.recipe.batch_size, dict[int, str]()
    open_ones = [i for i, sample in enumerate(samples) if not sample.is_answered]
    if not open_ones:
        return list(samples)
    batches = [open_ones[start : start + size] for start in range(0, len(open_ones), size)]

    def ask(batch: int) -> list[str]:
        asked = [samples[i] for i in batches[batch]]
        return job.teacher.answers(asked, len(asked))

    def take(batch: int, texts: list[str]) -> None:
        answers.update(zip(batches[batch], texts, strict=True))
        advance(len(texts))

    who = "teacher" if job.other else "original"
    with job.reporter.progress(f"{who} answers", len(open_ones)) as advance:
        job.processes.share(len(batches), ask, take, job.state.answers if job.state else None)
    answers = job.processes.agree(answers)
    return [sample.answered(answers[i]) if i in answers else sample for i, sample in enumerate(samples)]


def _survey(job: Job, pyramid: PyramidConfig, samples: Sequence[Sample]) -> tuple[Tried, ...]:
    """Let the model become the pyramid whose routes fit it best; return all that were tried."""
    model, recipe, pieces = job.model, job.recipe, 0
    with job.processes.as_one():
        some = samples[: FINAL_SAMPLES * recipe.survey.samples]
        examples = Encoded(some, job.processor, recipe.answer_tokens)
        grids = [expected_grids(sample, job.layout) for sample in some]

    def measure_some(title: str, tree: RouteTree, count: int) -> RouteTable:
        nonlocal pieces
        batches = plan_batches(tree, pyramid, grids[:count], recipe.batch_size, None)
        kept = job.state.surveys.after(pieces) if job.state else None
        pieces += len(batches)
        with job.reporter.progress(title, len(grids[:count])) as advance:
            pad = job.processor.tokenizer.pad_token_id
            table = measure(
                model, examples[:count], tree, batches, pad, kept,
                processes=job.processes, advance=advance, other=job.other,
            )  # fmt: skip
        return job.processes.agree(table)

    with model.as_pyramid(pyramid):
        shape = model.text_model.shape
        cheapest = [cheapest_route(shape, pyramid, *length) for length in dict.fromkeys(job.lengths)]
        found = survey(pyramid, grids, measure_some, recipe.survey, recipe.budget, list(dict.fromkeys(cheapest)))
    job.reporter.note(
        f"Tried {len(found.tried.routes) - 1} routes on {len(found.tried.distortion)} samples; the "
        f"{len(found.chosen)} that fit this model best are calibrated."
    )
    model.rebuild(found.pyramid)
    start_afresh(model.text_model.routers)
    return found.rows(pyramid)


def _learn(
    job: Job, samples: Sequence[Sample], num_held: int, again: bool = False
) -> tuple[RouteTable, list[tuple[Grid, ...]]]:
    """Measure samples, the held-out ones first, and let the model have routers that are fitted to them; see `_measure`.

    The main process fits, all get what it found.
    """
    table, grids = _measure(job, samples, num_held, again)
    recipe, model = job.recipe, job.model
    routers, pyramid = model.text_model.routers, model.pyramid
    if job.processes.is_main:
        held, learned = (table.part(rows) for rows in (range(num_held), range(num_held, len(samples))))
        losses = learned.loss
        with job.reporter.progress("fitting routers", recipe.epochs) as advance:
            fit_routers(routers, losses, held.loss, recipe.epochs, recipe.learning_rate, recipe.seed, advance)
        if pyramid.routes is not None:
            means = losses.distortion.nanmean(0).nan_to_num(0.0)
            model.pyramid = replace(pyramid, mean_losses=tuple(means.tolist()))
        pyramid = _solve(job, held)
    _take(model, job.processes.agree(pyramid))
    routers.load_state_dict(job.processes.agree({name: each.cpu() for name, each in routers.state_dict().items()}))
    return table, grids


def _measure(
    job: Job, samples: Sequence[Sample], num_held: int, again: bool = False
) -> tuple[RouteTable, list[tuple[Grid, ...]]]:
    """Measure samples: the held-out ones, which are first, down every route, the others as the recipe says.

    Args:
        job: what to measure with.
        samples: all of them.
        num_held: Number of held-out samples.
        again: Whether these samples were measured before, with a model that was not healed yet.

    Returns:
        The table, and the visual grids of every sample.
    """
    model, recipe = job.model, job.recipe
    with job.processes.as_one():
        examples = Encoded(samples, job.processor, recipe.answer_tokens)
        grids = [expected_grids(sample, job.layout) for sample in samples]
    tree = RouteTree.of(model.pyramid, grids)
    num_routes = recipe.routes_per_sample(len(tree.routes), len(samples) - num_held)
    batches = plan_batches(tree, model.pyramid, grids, recipe.batch_size, num_routes, complete=range(num_held))
    kept, features = (job.state.measurements, job.state.features) if job.state else (None, None)
    kept = kept.after(len(batches)) if kept and again else kept
    with job.reporter.progress("measuring routes", len(examples)) as advance:
        pad = job.processor.tokenizer.pad_token_id
        table = measure(model, examples, tree, batches, pad, kept, features, job.processes, advance, job.other)
    return table, grids


def _solve(job: Job, table: RouteTable) -> PyramidConfig:
    """Return the pyramid with the budget table of some samples, and the λ for the budget."""
    pyramid, routers = job.model.pyramid, job.model.text_model.routers
    with job.reporter.waiting("solving budgets"):
        pyramid = replace(pyramid, budgets=budget_table(routers, table, pyramid.mean_losses))
    within_reach = max(job.recipe.budget, pyramid.budgets[-1].fraction)  # it was checked before, but for rounding
    return replace(pyramid, trade_off=pyramid.trade_off_for(within_reach))


def _solve_budgets(job: Job, read: CalibrationData, claim: Claim | None, data: str) -> Report | None:
    """Solve λ and the budget table anew, on all samples of other data, and store them."""
    asked = read.asked
    table, grids = _measure(job, _answer(job, asked), len(asked))
    if claim is None:
        return None
    pyramid = _solve(job, table)
    settings = {
        **pyramid.calibration, "budget": job.recipe.budget,
        "budgets_solved_on": {"data": data, "data_digest": read.measured.digest, "teacher": job.teacher.name},
        **length_record(job.model.text_model.shape, pyramid, job.lengths),
    }  # fmt: skip
    report = _report(job, table, pyramid, asked, grids, settings)
    with job.reporter.waiting("writing the report"):
        save_budgets(claim, job.model, report)
    return report


def _report(
    job: Job,
    held: RouteTable,
    pyramid: PyramidConfig,
    samples: Sequence[Sample],
    grids: Sequence[tuple[Grid, ...]],
    settings: dict[str, Any],
) -> Report:
    """Sum up, with what both models answer to the held-out samples at the budget."""
    model, recipe = job.model, job.recipe
    with torch.no_grad():
        policy = Policy.of(model.text_model.routers, held)
    measured = ranked(held, policy.choose_as(pyramid, pyramid.trade_off))
    _take(model, pyramid)
    with job.reporter.progress("both models answer", len(measured)) as advance:
        cases = answer_both(model, job.processor, job.teacher, measured, samples, recipe.batch_size, advance)
    shape = model.text_model.shape
    about = {"teacher": job.teacher.name, "recipe": settings.get("recipe"), "data": settings.get("data")}
    origin = provenance(model, about)
    return Report.of(policy, pyramid, shape, grids, recipe.budget, cases, settings, origin)


def _take(model: PyramidGenerationMixin, pyramid: PyramidConfig) -> None:
    """Let the model run with its fitted routers."""
    model.text_model.routers.requires_grad_(False).to(model.device)
    model.pyramid = pyramid
