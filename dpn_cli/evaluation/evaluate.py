"""Evaluation as one call: what a pyramid loses and gains, and whether another method would have been better."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from dpn_cli.data.samples import Sample
from dpn_cli.errors import DataError, UsageError
from dpn_cli.evaluation.baselines import make_baseline
from dpn_cli.evaluation.baselines.contender import Contender, Prompt, unequal
from dpn_cli.evaluation.baselines.routes import Original, Routed
from dpn_cli.evaluation.figures import Figures, Question, by_kind
from dpn_cli.evaluation.judging import Evaluator, Outcome
from dpn_cli.evaluation.options import EvaluationOptions
from dpn_cli.evaluation.spending import Spending
from dpn_cli.intervals import Estimate, bootstrap_mean
from dpn_cli.reporter import Reporter

Entry = tuple[float | None, Contender]  # a budget, and who is to spend it


@dataclass(frozen=True)
class Standing:
    """A contender at a budget.

    Attributes:
        contender: its name.
        label: its name and settings.
        budget: asked for, or what the checkpoint is set to; None where that is no limit.
        figures: of all samples.
        kinds: of every kind of question.
        fraction_over_dpn: its FLOPs fraction less the pyramid's at the same budget, where there is one.
        distortion_over_dpn: its KL less the pyramid's, sample by sample, likewise.
        outcomes: of every sample.
    """

    contender: str
    label: str
    budget: float | None
    figures: Figures
    kinds: dict[str, Figures]
    fraction_over_dpn: float | None
    distortion_over_dpn: Estimate | None
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(
        cls,
        entry: Entry,
        outcomes: Sequence[Outcome],
        questions: Sequence[Question],
        metric: str,
        dpn: "Standing | None" = None,
    ) -> "Standing":
        """Sum up what a contender made of all samples, beside the pyramid at the same budget."""
        budget, contender = entry
        pairs = () if dpn is None else zip(outcomes, dpn.outcomes, strict=True)
        over = [theirs.distortion - ours.distortion for theirs, ours in pairs]
        figures = Figures.of(outcomes, questions, metric)
        return cls(
            contender=contender.name,
            label=contender.label,
            budget=budget,
            figures=figures,
            kinds=by_kind(outcomes, questions, metric),
            fraction_over_dpn=None if dpn is None else figures.fraction - dpn.figures.fraction,
            distortion_over_dpn=bootstrap_mean(over) if over else None,
            outcomes=tuple(outcomes),
        )

    @property
    def inequality(self) -> str | None:
        """Says that it does not spend what the pyramid does; None where it does, or there is nothing to compare."""
        spent, over = self.figures.fraction, self.fraction_over_dpn
        return None if over is None else unequal(self.label, spent, spent - over)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the single samples."""
        data = asdict(replace(self, outcomes=()))
        del data["outcomes"]
        return data


@dataclass(frozen=True)
class Evaluation:
    """All standings: the original's first, then those of every budget, the pyramid's first.

    Attributes:
        questions: what was asked, as far as figures need it.
        standings: see above.
        left_out: why a contender is missing at a budget.
    """

    questions: tuple[Question, ...]
    standings: tuple[Standing, ...]
    left_out: tuple[str, ...]

    def of(self, contender: str) -> list[Standing]:
        """Return the standings of one contender, in the order of the budgets."""
        return [standing for standing in self.standings if standing.contender == contender]

    @property
    def spendings(self) -> list[Spending]:
        """What the pyramid has spent at every budget."""
        found = [(standing.budget, standing.figures) for standing in self.of(Routed.name)]
        return [Spending(budget, figures.fraction, figures.count) for budget, figures in found if budget is not None]

    @property
    def not_equal(self) -> list[str]:
        """Say which contenders do not spend what the pyramid does."""
        found = [(standing.budget, standing.inequality) for standing in self.standings]
        return [remark if budget is None else f"at {budget:g}, {remark}" for budget, remark in found if remark]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "samples": len(self.questions),
            "budgets": [each.to_dict() for each in self.spendings],
            "standings": [standing.to_dict() for standing in self.standings],
            "left_out": list(self.left_out),
            "not_equal": self.not_equal,
        }


def evaluate(
    evaluator: Evaluator, samples: Sequence[Sample], options: EvaluationOptions, reporter: Reporter
) -> Evaluation:
    """Let a pyramid and its contenders answer, and compare them at equal FLOPs.

    Every contender is fitted to what the pyramid has spent on these very samples at a budget; where the pyramid
    cannot spend so little, to the budget itself. Where a contender has no setting near enough, the result says so.

    Args:
        evaluator: the model, and how it is asked.
        samples: the samples, each with at least one image.
        options: what is compared, and how.
        reporter: told about the progress.

    Raises:
        DataError: if there are no samples.
        UsageError: if the pyramid can spend none of the budgets.
    """
    if not samples:
        raise DataError("the data has no sample with an image: there is nothing to evaluate")
    budgets = list(dict.fromkeys(options.budgets))
    pyramids, refused = _pyramids(evaluator, budgets)
    with reporter.progress("asking the teacher", len(samples)) as advance:
        teacher = evaluator.ask(Original(), samples, advance)
    comparison = _Comparison(evaluator, samples, teacher, options.metric, reporter)
    routed = comparison.stand("asking the pyramid", pyramids)
    spent = {standing.budget: standing for standing in routed}
    asked: list[float | None] = [*budgets] or list(spent)
    entries, out_of_reach = _baselines(evaluator, comparison.sizes, options.against, asked, spent)
    baselines = _best(comparison.stand("asking the others", entries, spent))
    order = [standing for budget in asked for standing in (*routed, *baselines) if standing.budget == budget]
    return Evaluation(comparison.questions, (comparison.original(), *order), (*refused, *out_of_reach))


@dataclass(frozen=True)
class _Comparison:
    """What all standings of an evaluation are compared by."""

    evaluator: Evaluator
    samples: Sequence[Sample]
    teacher: Sequence[str]
    metric: str
    reporter: Reporter

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """What was asked, and what the data and the teacher answer."""
        without = "without" if any(sample.kind for sample in self.samples) else "all"
        return tuple(
            Question(sample.kind or without, sample.turns[sample.asked].answer, answer)
            for sample, answer in zip(self.samples, self.teacher, strict=True)
        )

    @cached_property
    def sizes(self) -> list[Prompt]:
        """What the prefill of every prompt depends on."""
        return self.evaluator.sizes(self.samples)

    def original(self) -> Standing:
        """Return the standing of the teacher, which loses nothing and needs not be asked again."""
        pairs = zip(self.teacher, self.sizes, strict=True)
        outcomes = [Outcome(answer, 0.0, 1.0, 1.0, size.visual_tokens) for answer, size in pairs]
        return Standing.of((None, Original()), outcomes, self.questions, self.metric)

    def stand(
        self, what: str, entries: Sequence[Entry], dpn: dict[float | None, Standing] | None = None
    ) -> list[Standing]:
        """Let contenders answer; compare them with the pyramid's standings by budget, if given."""
        if not entries:
            return []
        with self.reporter.progress(what, len(self.samples)) as advance:
            judged = self.evaluator.judge([contender for _, contender in entries], self.samples, self.teacher, advance)
        return [
            Standing.of(entry, outcomes, self.questions, self.metric, (dpn or {}).get(entry[0]))
            for entry, outcomes in zip(entries, judged, strict=True)
        ]


def _pyramids(evaluator: Evaluator, budgets: Sequence[float]) -> tuple[list[Entry], list[str]]:
    """Return the pyramid at every budget that it can spend, and why not at the others."""
    if not budgets:
        return [(evaluator.model.pyramid.budget, Routed())], []
    entries: list[Entry] = []
    refused: list[str] = []
    for budget in budgets:
        try:
            evaluator.model.pyramid.trade_off_for(budget)
        except ValueError as error:
            refused.append(f"dpn at {budget:g}: {error}")
        else:
            entries.append((budget, Routed(budget)))
    if not entries:
        raise UsageError(refused[0].partition(": ")[2])
    return entries, refused


def _baselines(
    evaluator: Evaluator,
    sizes: Sequence[Prompt],
    against: Sequence[str],
    budgets: Sequence[float | None],
    spent: dict[float | None, Standing],
) -> tuple[list[Entry], list[str]]:
    """Return every contender at what the pyramid has spent, and why some are missing."""
    shape = evaluator.model.text_model.shape
    names = [name for name in against if name != Original.name]  # which has its place already
    entries: list[Entry] = []
    out_of_reach: list[str] = []
    for budget in budgets:
        fraction = spent[budget].figures.fraction if budget in spent else budget
        assert fraction is not None
        for name in names:
            try:
                fitted = make_baseline(name, evaluator.model.pyramid).candidates(shape, sizes, fraction)
                for contender in fitted:
                    with contender.applied(evaluator.model):  # says whether this model is of a kind that it can handle
                        pass
            except (ValueError, UsageError) as error:
                out_of_reach.append(f"{name} at {fraction:.3g}: {error}")
            else:
                entries += [(budget, contender) for contender in fitted]
    return entries, out_of_reach


def _best(standings: Iterable[Standing]) -> list[Standing]:
    """Return of every contender at every budget its settings of least KL."""
    best: dict[tuple[str, float | None], Standing] = {}
    for standing in standings:
        key = (standing.contender, standing.budget)
        if key not in best or standing.figures.distortion.value < best[key].figures.distortion.value:
            best[key] = standing
    return list(best.values())
