"""Evaluation as one call: what a pyramid loses and gains, and whether another method would have been better."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from dpn_cli.data.metrics import METRICS
from dpn_cli.data.samples import Sample
from dpn_cli.errors import DataError, UsageError
from dpn_cli.evaluation.baselines import fit_baselines
from dpn_cli.evaluation.baselines.baseline import Baseline, Prompt, unequal
from dpn_cli.evaluation.baselines.routes import Original, Routed, walked_by_all
from dpn_cli.evaluation.figures import Figures, Question, by_kind
from dpn_cli.evaluation.judging import Evaluator, SampleResult
from dpn_cli.evaluation.options import EvaluationOptions
from dpn_cli.evaluation.spending import Spending
from dpn_cli.intervals import Estimate, bootstrap_mean
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.route import parse_route
from dpn_cli.reporter import Reporter

Entry = tuple[float | None, Baseline]  # a budget, and who is to spend it


@dataclass(frozen=True)
class Result:
    """What a method reached at a budget.

    Attributes:
        method: the method's name.
        label: the method's name and settings.
        budget: the budget that was asked for, or that the checkpoint is set to; None if there is no limit.
        figures: figures over all samples.
        kinds: figures by kind of question.
        fraction_over_dpn: the FLOPs fraction less the pyramid's at the same budget; None if it is not compared.
        distortion_over_dpn: the KL less the pyramid's, sample by sample; None if it is not compared.
        per_sample: the result of every sample.
    """

    method: str
    label: str
    budget: float | None
    figures: Figures
    kinds: dict[str, Figures]
    fraction_over_dpn: float | None
    distortion_over_dpn: Estimate | None
    per_sample: tuple[SampleResult, ...]

    @classmethod
    def of(
        cls,
        entry: Entry,
        samples: Sequence[SampleResult],
        questions: Sequence[Question],
        metric: str,
        dpn: "Result | None" = None,
    ) -> "Result":
        """Sum up what a method made of all samples, beside the pyramid at the same budget."""
        budget, method = entry
        pairs = () if dpn is None else zip(samples, dpn.per_sample, strict=True)
        over = [theirs.distortion - ours.distortion for theirs, ours in pairs]
        figures = Figures.of(samples, questions, metric)
        return cls(
            method=method.name,
            label=method.label,
            budget=budget,
            figures=figures,
            kinds=by_kind(samples, questions, metric),
            fraction_over_dpn=None if dpn is None else figures.fraction - dpn.figures.fraction,
            distortion_over_dpn=bootstrap_mean(over) if over else None,
            per_sample=tuple(samples),
        )

    @property
    def inequality(self) -> str | None:
        """Says that it does not spend what the pyramid does; None where it does, or there is nothing to compare."""
        spent, over = self.figures.fraction, self.fraction_over_dpn
        return None if over is None else unequal(self.label, spent, spent - over)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the single samples."""
        data = asdict(replace(self, per_sample=()))
        del data["per_sample"]
        return data


@dataclass(frozen=True)
class LeftOut:
    """A method that is missing at a budget.

    Attributes:
        method: the method's name.
        budget: the budget that was asked for; None for what the checkpoint is set to.
        fraction: the fraction of the prefill FLOPs that the method was to spend.
        reason: why it is missing.
    """

    method: str
    budget: float | None
    fraction: float
    reason: str

    def __str__(self) -> str:
        """Return it in a sentence."""
        return f"{self.method} at {self.fraction:.3g}: {self.reason}"


@dataclass(frozen=True)
class Evaluation:
    """The results of all methods at all budgets.

    Attributes:
        questions: Questions that were asked, as far as figures need them.
        results: the original's result, then those of every budget, the pyramid's first.
        left_out: the methods that are missing at a budget, and why.
    """

    questions: tuple[Question, ...]
    results: tuple[Result, ...]
    left_out: tuple[LeftOut, ...]

    def of(self, method: str) -> list[Result]:
        """Return the results of one method, in the order of the budgets."""
        return [result for result in self.results if result.method == method]

    @property
    def pyramids(self) -> list[Result]:
        """The pyramid's results, in the order of the budgets."""
        return self.of(Routed.name)

    @property
    def spendings(self) -> list[Spending]:
        """What the pyramid has spent at every budget."""
        found = [(result.budget, result.figures) for result in self.pyramids]
        return [Spending(budget, figures.fraction, figures.count) for budget, figures in found if budget is not None]

    @property
    def not_equal(self) -> list[str]:
        """Say which methods do not spend what the pyramid does."""
        found = [(result.budget, result.inequality) for result in self.results]
        return [remark if budget is None else f"at {budget:g}, {remark}" for budget, remark in found if remark]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "samples": len(self.questions),
            "budgets": [each.to_dict() for each in self.spendings],
            "results": [result.to_dict() for result in self.results],
            "left_out": list(map(str, self.left_out)),
            "not_equal": self.not_equal,
        }


def evaluate(
    evaluator: Evaluator, samples: Sequence[Sample], options: EvaluationOptions, reporter: Reporter
) -> Evaluation:
    """Let a pyramid and its baselines answer, and compare them at equal FLOPs.

    Every baseline is fitted to what the pyramid has spent on these very samples at a budget; where the pyramid cannot
    spend so little, to the budget itself. Where a baseline has no setting near enough, the result says so.

    Args:
        evaluator: the model, and how it is asked.
        samples: the samples, each with at least one image.
        options: Options of the comparison.
        reporter: Reporter of the progress.

    Raises:
        DataError: if there are no samples.
        UsageError: if the pyramid can spend none of the budgets, or a route does not fit a sample.
    """
    if not samples:
        raise DataError("the data have no sample with an image: there is nothing to evaluate")
    budgets = list(dict.fromkeys(options.budgets))
    pyramids, refused = at_budgets(evaluator.model.pyramid, budgets)
    sizes, pyramid = evaluator.sizes(samples), evaluator.model.pyramid
    fixed = walked_by_all(pyramid, [parse_route(route, pyramid.sites) for route in options.routes], sizes)
    comparison = _Comparison(evaluator, samples, sizes, options.metric, reporter)
    routed = comparison.measure("both models answer", pyramids)
    spent = {result.budget: result for result in routed}
    asked: list[float | None] = [*budgets] or list(spent)
    entries, out_of_reach = _baselines(evaluator.model, sizes, options.against, asked, spent)
    others = comparison.measure("others answer", [*entries, *((None, route) for route in fixed)], spent)
    baselines, on_routes = _best(others[: len(entries)]), others[len(entries) :]
    order = [result for budget in asked for result in (*routed, *baselines) if result.budget == budget]
    return Evaluation(comparison.questions, (comparison.original(), *order, *on_routes), (*refused, *out_of_reach))


def validate_metric(name: str, samples: Sequence[Sample]) -> None:
    """Check that a metric can score by all labels of the questions that samples ask.

    Raises:
        UsageError: if it cannot.
    """
    labels = [label for sample in samples if (label := sample.turns[sample.asked].answer) is not None]
    if unfit := [label for label in labels if not METRICS[name].fits(label)]:
        raise UsageError(
            f"--metric {name} scores by the {METRICS[name].description}, but {len(unfit)} of {len(labels)} labels have "
            f"none, such as {unfit[0]!r:.60}: choose another metric"
        )


@dataclass(frozen=True)
class _Comparison:
    """What all results of an evaluation are compared by."""

    evaluator: Evaluator
    samples: Sequence[Sample]
    sizes: Sequence[Prompt]
    metric: str
    reporter: Reporter

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """What was asked, and what the data and the teacher answer, once a method was measured."""
        without = "without" if any(sample.kind for sample in self.samples) else "all"
        return tuple(
            Question(sample.kind or without, sample.turns[sample.asked].answer, answer)
            for sample, answer in zip(self.samples, self.evaluator.teacher_answers, strict=True)
        )

    def original(self) -> Result:
        """Return the teacher's result, which loses nothing and need not be asked again."""
        pairs = zip(self.evaluator.teacher_answers, self.sizes, strict=True)
        samples = [SampleResult(answer, 0.0, 1.0, 1.0, size.visual_tokens) for answer, size in pairs]
        return Result.of((None, Original()), samples, self.questions, self.metric)

    def measure(
        self, what: str, entries: Sequence[Entry], dpn: dict[float | None, Result] | None = None
    ) -> list[Result]:
        """Let methods answer; compare them with the pyramid's results by budget, if given."""
        if not entries:
            return []
        with self.reporter.progress(what, len(self.samples)) as advance:
            methods = [method for _, method in entries]
            judged = self.evaluator.judge(methods, self.samples, self.sizes, advance)
        return [
            Result.of(entry, samples, self.questions, self.metric, (dpn or {}).get(entry[0]))
            for entry, samples in zip(entries, judged, strict=True)
        ]


def at_budgets(pyramid: PyramidConfig, budgets: Sequence[float]) -> tuple[list[Entry], list[LeftOut]]:
    """Return the pyramid at every budget that it can spend, and why not at the others.

    Raises:
        UsageError: if it can spend none of them.
    """
    if not budgets:
        return [(pyramid.budget, Routed())], []
    entries: list[Entry] = []
    refused: list[LeftOut] = []
    for budget in budgets:
        try:
            pyramid.trade_off_for(budget)
        except ValueError as error:
            refused.append(LeftOut(Routed.name, budget, budget, str(error)))
        else:
            entries.append((budget, Routed(budget)))
    if not entries:
        raise UsageError(refused[0].reason)
    return entries, refused


def _baselines(
    model: PyramidGenerationMixin,
    sizes: Sequence[Prompt],
    against: Sequence[str],
    budgets: Sequence[float | None],
    spent: dict[float | None, Result],
) -> tuple[list[Entry], list[LeftOut]]:
    """Return every baseline at what the pyramid has spent, and why some are missing."""
    shape = model.text_model.shape
    entries: list[Entry] = []
    out_of_reach: list[LeftOut] = []
    for budget in budgets:
        fraction = spent[budget].figures.fraction if budget in spent else budget
        assert fraction is not None
        fits = fit_baselines(against, model, fraction, lambda each, spends: each.candidates(shape, sizes, spends))
        for name, fitted, refusal in fits:
            entries += [(budget, baseline) for baseline in fitted]
            if refusal:
                out_of_reach.append(LeftOut(name, budget, fraction, refusal))
    return entries, out_of_reach


def _best(results: Iterable[Result]) -> list[Result]:
    """Return of every baseline at every budget its settings of least KL."""
    best: dict[tuple[str, float | None], Result] = {}
    for result in results:
        key = (result.method, result.budget)
        if key not in best or result.figures.distortion.value < best[key].figures.distortion.value:
            best[key] = result
    return list(best.values())
