"""Calibration as one call: samples in, fitted routers and a budget table in the checkpoint's folder out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dpn_cli.calibration.budgets import budget_table
from dpn_cli.calibration.data import Sample, load_data
from dpn_cli.calibration.encoding import encode, prompts
from dpn_cli.calibration.fitting import fit_routers
from dpn_cli.calibration.policy import Outcome, Policy, fixed_routes, outcome
from dpn_cli.calibration.rollout import RouteTable, measure
from dpn_cli.calibration.statistics import wilson_interval
from dpn_cli.calibration.store import save_calibration
from dpn_cli.errors import DataError, UsageError
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration
from dpn_cli.modeling.loading import load_model
from dpn_cli.modeling.pyramid_config import PyramidConfig
from dpn_cli.recipe import CalibrationRecipe

WORST = 10  # samples that the report lists
MIN_SAMPLES = 16

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Report:
    """What a calibration reached; every figure is of held-out samples.

    Attributes:
        budget: asked for.
        trade_off: the λ that it takes.
        routed: the calibrated model at that λ.
        full: the model that pools nothing.
        best_fixed: the best fixed route that spends no more than the routed model, as (route, its outcome).
        agreement_interval: 95%, of `routed.agreement`.
        budgets: the whole table.
        worst: of the held-out samples, those with the largest distortion.
        settings: what was run, for the record.
    """

    budget: float
    trade_off: float
    routed: Outcome
    full: Outcome
    best_fixed: tuple[tuple[int, ...], Outcome] | None
    agreement_interval: tuple[float, float]
    budgets: tuple[Any, ...]
    worst: list[dict[str, Any]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        data = asdict(self)
        for name in ("routed", "full"):
            data[name]["shares"] = _plain(data[name]["shares"])
        if self.best_fixed is not None:
            route, fixed = self.best_fixed
            data["best_fixed"] = {**asdict(fixed), "shares": _plain(fixed.shares), "route": list(route)}
        return data


def calibrate(
    folder: Path,
    data: str,
    recipe: CalibrationRecipe,
    image_root: Path | None,
    progress: Progress,
    say: Callable[[str], None],
) -> Report:
    """Fit the routers of a converted checkpoint and store them, the budget table and a report in its folder.

    The base weights are not touched. A budget below what the pyramid reaches is refused before anything is written.

    Args:
        folder: from `dpn convert`.
        data: see `load_data`.
        recipe: samples, routes, seeds and the budget.
        image_root: see `load_data`.
        progress: opens a progress bar (description, total) and yields its `advance`.
        say: told what goes on, a sentence at a time.

    Raises:
        DataError: if there are too few samples.
        UsageError: if the budget is out of reach, or the checkpoint has no routers.
    """
    from transformers import AutoProcessor

    samples = list(islice(load_data(data, image_root, recipe.prompts), recipe.samples))
    if len(samples) < MIN_SAMPLES:
        raise DataError(f"--data {data} has {len(samples)} samples with an image, calibration needs {MIN_SAMPLES}")
    model = load_model(folder)
    if model.pyramid.static_route is not None:
        raise UsageError(f"{folder} has a static route and no routers: there is nothing to calibrate")
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    say(f"{len(samples)} samples from {data}; model in {model.dtype} on {model.device}")

    samples = answer(model, processor, samples, recipe, progress)
    examples = [encode(sample, processor, recipe.answer_tokens) for sample in samples]
    with progress("measuring routes", len(examples)) as advance:
        table = measure(model, examples, recipe.batch_size, processor.tokenizer.pad_token_id, advance)

    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(recipe.seed))
    held_out = max(1, round(recipe.holdout * len(samples)))
    held_rows = order[:held_out]
    fitted, held = table.select(order[held_out:]), table.select(held_rows)
    routers = model.model.language_model.routers.to("cpu", torch.float32).requires_grad_(True)
    with progress("fitting routers", recipe.epochs) as advance:
        fit = fit_routers(routers, fitted, held, recipe.epochs, recipe.learning_rate, recipe.seed, advance)

    pyramid = replace(model.pyramid, budgets=budget_table(routers, held))
    pyramid = replace(pyramid, trade_off=_trade_off(pyramid, recipe.budget))
    settings = {
        "data": data,
        **recipe.model_dump(mode="json", exclude={"prompts"}),
        "objective": fit.objective,
    }
    with torch.no_grad():
        taken = Policy.of(routers, held).choose(pyramid.trade_off)
    report = _report(held, taken, pyramid, recipe.budget, settings, [samples[i] for i in held_rows])
    pyramid = replace(pyramid, calibration=_summary(report))
    save_calibration(folder, routers, pyramid, report.to_dict())
    return report


def answer(
    model: DpnLlavaForConditionalGeneration,
    processor: Any,
    samples: Sequence[Sample],
    recipe: CalibrationRecipe,
    progress: Progress,
) -> list[Sample]:
    """Answer the samples that have no answers with the teacher's own, greedily."""
    complete = list(samples)
    open_ones = [i for i, sample in enumerate(samples) if any(turn.answer is None for turn in sample.turns)]
    if not open_ones:
        return complete
    with model.teacher(), progress("asking the teacher", len(open_ones)) as advance:
        for start in range(0, len(open_ones), recipe.batch_size):
            rows = open_ones[start : start + recipe.batch_size]
            inputs = prompts([samples[i] for i in rows], processor, model.device)
            generated = model.generate(**inputs, max_new_tokens=recipe.answer_tokens, do_sample=False)
            texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                complete[i] = samples[i].answered(text.strip())
            advance(len(rows))
    return complete


def _trade_off(pyramid: PyramidConfig, budget: float) -> float:
    try:
        return pyramid.trade_off_for(budget)
    except ValueError as error:
        raise UsageError(f"{error}; ask for more, or convert again with a first site earlier in the decoder") from None


def _report(
    held: RouteTable,
    taken: torch.Tensor,
    pyramid: PyramidConfig,
    budget: float,
    settings: dict[str, Any],
    samples: Sequence[Sample],
) -> Report:
    routed, fixed = outcome(held, taken), fixed_routes(held)
    affordable = {r: o for r, o in fixed.items() if o.fraction <= routed.fraction}
    best = min(affordable, key=lambda route: affordable[route].distortion) if affordable else None
    rows = torch.arange(len(taken))
    distortion = held.distortion[rows, taken]
    worst = [
        {
            "id": samples[i].id,
            "question": samples[i].turns[0].question,
            "answer": samples[i].turns[0].answer,
            "distortion": distortion[i].item(),
            "route": list(held.tree.routes[int(taken[i])]),
        }
        for i in distortion.argsort(descending=True)[:WORST].tolist()
    ]
    return Report(
        budget=budget,
        trade_off=pyramid.trade_off,
        routed=routed,
        full=fixed[pyramid.full_route],
        best_fixed=None if best is None else (best, affordable[best]),
        agreement_interval=wilson_interval(routed.agreement * len(taken), len(taken)),
        budgets=pyramid.budgets,
        worst=worst,
        settings={**settings, "held_out": len(taken)},
    )


def _summary(report: Report) -> dict[str, Any]:
    """Return what config.json remembers of a calibration."""
    return {
        **report.settings,
        "distortion": report.routed.distortion,
        "agreement": report.routed.agreement,
        "agreement_interval": list(report.agreement_interval),
    }


def _plain(shares: dict[tuple[int, ...], float]) -> dict[str, float]:
    return {",".join(map(str, route)): share for route, share in shares.items()}
