"""Calibration as one call: samples in, fitted routers and a budget table in the checkpoint's folder out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpn_cli.calibration.budgets import budget_table
from dpn_cli.calibration.cases import Case, answer_both, extremes, greedy_answers
from dpn_cli.calibration.data import MAX_BAD, OnBadRow, Sample, load_data
from dpn_cli.calibration.encoding import encode, token_limit
from dpn_cli.calibration.fingerprint import fingerprint
from dpn_cli.calibration.fitting import fit_routers, held_out_objective, trade_off_range
from dpn_cli.calibration.policy import Policy
from dpn_cli.calibration.quantised import load_frozen
from dpn_cli.calibration.report import Report
from dpn_cli.calibration.rollout import RouteTable, measure, plan_batches
from dpn_cli.calibration.state import MeasurementState, drop_state
from dpn_cli.calibration.store import save_calibration
from dpn_cli.calibration.tuning import drop_stale_adapter, frozen_dtype, keep_adapter, tune, unused_sections
from dpn_cli.convert import initial_tensors
from dpn_cli.errors import DataError, UsageError
from dpn_cli.modeling.configuration import DpnLlavaConfig
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration
from dpn_cli.modeling.loading import default_device
from dpn_cli.modeling.pyramid_config import PyramidConfig
from dpn_cli.recipe import CalibrationRecipe

MIN_SAMPLES = 16

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def calibrate(
    folder: Path,
    data: str,
    recipe: CalibrationRecipe,
    image_root: Path | None,
    progress: Progress,
    say: Callable[[str], None],
    restart: bool = False,
    on_bad_row: OnBadRow = "fail",
    max_bad: float = MAX_BAD,
) -> Report:
    """Fit the routers of a converted checkpoint and store them, the budget table and a report in its folder.

    The base weights are not touched. Measurements are kept as they are made, so that the same call goes on after a
    kill. A budget below what the pyramid reaches is refused before anything else is written.

    Args:
        folder: from `dpn convert`.
        data: see `load_data`.
        recipe: samples, routes, seeds and the budget.
        image_root: see `load_data`.
        progress: opens a progress bar (description, total) and yields its `advance`.
        say: told what goes on, a sentence at a time.
        restart: drop what an unfinished calibration has measured.
        on_bad_row: see `load_data`.
        max_bad: see `load_data`.

    Raises:
        DataError: if there are too few samples, or bad ones.
        UsageError: if the budget is out of reach, the checkpoint has no routers, or an unfinished calibration
            differs from this one.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    max_tokens = DpnLlavaConfig.from_pretrained(folder).text_config.max_position_embeddings
    dataset = load_data(
        data, image_root, recipe.prompts, on_bad_row=on_bad_row, max_bad=max_bad, limit=recipe.samples,
        seed=recipe.seed, check=token_limit(processor, max_tokens, recipe.answer_tokens), progress=progress,
    )  # fmt: skip
    for line in dataset.scan.lines():
        say(line)
    samples = [sample for sample in dataset.samples if sample.images]
    if len(samples) < MIN_SAMPLES:
        raise DataError(f"--data {data} has {len(samples)} samples with an image, calibration needs {MIN_SAMPLES}")
    if restart:
        drop_state(folder)
    state = MeasurementState(folder, fingerprint(folder, dataset.digest, recipe))
    model = load_frozen(folder, recipe.load_in, frozen_dtype(recipe), device_map=default_device())
    if model.pyramid.static_route is not None:
        raise UsageError(f"{folder} has a static route and no routers: there is nothing to calibrate")
    _start_afresh(model.model.language_model.routers)
    say(f"{len(samples)} samples from {data}; model in {model.dtype} on {model.device}")

    asked, samples = samples, answer(model, processor, samples, recipe, state, progress)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(recipe.seed))
    num_held = max(1, round(recipe.holdout * len(samples)))
    held_rows, fit_rows = order[:num_held], order[num_held:]
    tuned = tune(
        model, processor, [(samples[i], asked[i].is_answered) for i in fit_rows],
        [sample for sample in dataset.samples if not sample.images], recipe, state.folder, progress,
    )  # fmt: skip
    if recipe.objective == "paper":  # the routers are trained: only what they are judged by is measured
        asked, samples = [asked[i] for i in held_rows], [samples[i] for i in held_rows]
        held_rows, fit_rows = torch.arange(num_held), fit_rows[:0]
    table = _measure(model, processor, samples, held_rows.tolist(), recipe, state, progress)
    held = table.select(held_rows)

    routers = model.model.language_model.routers.to("cpu", torch.float32).requires_grad_(True)
    if recipe.objective == "paper":
        objective = held_out_objective(routers, held, *trade_off_range(held))
    else:
        with progress("fitting routers", recipe.epochs) as advance:
            objective = fit_routers(
                routers, table.select(fit_rows), held, recipe.epochs, recipe.learning_rate, recipe.seed, advance
            ).objective
    pyramid = replace(model.pyramid, budgets=budget_table(routers, held))
    pyramid = replace(pyramid, trade_off=_trade_off(pyramid, recipe.budget))
    with torch.no_grad():
        policy = Policy.of(routers, held)
    settings = {
        "data": data, "data_digest": dataset.digest,
        **recipe.model_dump(mode="json", exclude={"prompts", *unused_sections(recipe)}),
        "objective_over_best_fixed": objective, "training": tuned and tuned.summary(),
    }  # fmt: skip
    _take(model, routers, pyramid)
    cases = _cases(model, processor, policy, [asked[i] for i in held_rows], recipe, progress)
    grids = [(model.model.image_grid(),) * len(samples[i].images) for i in held_rows]
    shape = model.model.language_model.shape
    report = Report.of(policy, pyramid, shape, grids, recipe.budget, *cases, settings)
    adapter = keep_adapter(model, folder)
    save_calibration(folder, routers, replace(pyramid, calibration=report.summary() | adapter), report)
    drop_stale_adapter(folder, adapter)
    drop_state(folder)
    return report


def _start_afresh(routers: nn.ModuleList) -> None:
    """Make routers what they are after conversion: what an earlier or killed calibration left has no say."""
    shapes = {name: tuple(tensor.shape) for name, tensor in routers.state_dict().items()}
    routers.load_state_dict({name: torch.from_numpy(values) for name, values in initial_tensors(shapes)})


def _measure(
    model: DpnLlavaForConditionalGeneration,
    processor: Any,
    samples: Sequence[Sample],
    held_rows: Sequence[int],
    recipe: CalibrationRecipe,
    state: MeasurementState,
    progress: Progress,
) -> RouteTable:
    """Measure the samples: the held-out ones down every route, the others down as many as the recipe says."""
    examples = [encode(sample, processor, recipe.answer_tokens) for sample in samples]
    grids = [(model.model.image_grid(),) * len(example.pixel_values) for example in examples]
    num_routes = None if recipe.routes == "all" else recipe.routes
    batches = plan_batches(model.pyramid, grids, recipe.batch_size, num_routes, complete=set(held_rows))
    with progress("measuring routes", len(examples)) as advance:
        return measure(model, examples, batches, processor.tokenizer.pad_token_id, state, advance)


def answer(
    model: DpnLlavaForConditionalGeneration,
    processor: Any,
    samples: Sequence[Sample],
    recipe: CalibrationRecipe,
    state: MeasurementState,
    progress: Progress,
) -> list[Sample]:
    """Answer the samples that have no answers with the teacher's own, greedily."""
    complete = list(samples)
    open_ones = [i for i, sample in enumerate(samples) if any(turn.answer is None for turn in sample.turns)]
    if not open_ones:
        return complete
    with model.teacher(), progress("asking the teacher", len(open_ones)) as advance:
        for batch, start in enumerate(range(0, len(open_ones), recipe.batch_size)):
            rows = open_ones[start : start + recipe.batch_size]
            texts = state.answers(batch)
            if texts is None:
                texts = greedy_answers(model, processor, [samples[i] for i in rows], len(rows), recipe.answer_tokens)
                state.keep_answers(batch, texts)
            for i, text in zip(rows, texts, strict=True):
                complete[i] = samples[i].answered(text)
            advance(len(rows))
    return complete


def _take(model: DpnLlavaForConditionalGeneration, routers: nn.ModuleList, pyramid: PyramidConfig) -> None:
    """Let the model run with its fitted routers."""
    routers.requires_grad_(False).to(model.device)
    model.model.language_model.pyramid = pyramid
    model.model.language_model.trade_off = pyramid.trade_off


def _cases(
    model: DpnLlavaForConditionalGeneration,
    processor: Any,
    policy: Policy,
    held: Sequence[Sample],
    recipe: CalibrationRecipe,
    progress: Progress,
) -> tuple[list[Case], list[Case]]:
    """Ask both models about the held-out samples that fare worst and best at the budget."""
    worst, best = extremes(policy.table, policy.choose(model.pyramid.trade_off))
    with progress("asking both models", len(worst) + len(best)) as advance:
        cases = answer_both(model, processor, [*worst, *best], held, recipe.batch_size, recipe.answer_tokens, advance)
    return cases[: len(worst)], cases[len(worst) :]


def _trade_off(pyramid: PyramidConfig, budget: float) -> float:
    try:
        return pyramid.trade_off_for(budget)
    except ValueError as error:
        raise UsageError(f"{error}; ask for more, or convert again with a first site earlier in the decoder") from None
