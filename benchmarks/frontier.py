"""Would another method have given more for the same compute? The pyramid and all baselines, budget by budget.

On the demo, which it converts and calibrates in a temporary folder, or on any calibrated folder, and on one that was
healed from the same model if there is one:

    python benchmarks/frontier.py
    python benchmarks/frontier.py --model llava-1.5-7b-dpn --healed healed-dpn --data mydata.json --samples 700

All methods answer the same held-out samples and spend what the pyramid spends on them; at a budget that the pyramid
cannot reach, the budget itself. The teacher is the original, and the other methods run on its weights. Intervals are
95%, of a paired bootstrap over the samples. Two baselines stand for all at every budget: the one that agrees best with
the original, and the one with the least KL, of those that spend no more than the pyramid, for a smaller budget, too.
The verdict is `best` or `beaten` if at least one of the two intervals leaves zero out and none does on the other side,
else `tied`.

"Hard" is the agreement on those samples of which smaller pictures (`downsample`) get an answer token wrong at the same
budget: many questions need no detail, and there all methods look good (VTC-Bench, https://arxiv.org/abs/2510.07143).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import click
from calibration import BUDGETS, show

from dpn_cli import console
from dpn_cli.calibration.calibrate import calibrate
from dpn_cli.calibration.settings import calibration_recipe
from dpn_cli.conversion.convert import convert
from dpn_cli.data.options import DataOptions
from dpn_cli.evaluation.baselines import BASELINES
from dpn_cli.evaluation.baselines.baseline import TOLERANCE
from dpn_cli.evaluation.baselines.downsampling import ImageDownsampling
from dpn_cli.evaluation.baselines.routes import Routed
from dpn_cli.evaluation.drawing import plot_evaluation
from dpn_cli.evaluation.evaluate import Evaluation, Result
from dpn_cli.evaluation.options import EvaluationOptions
from dpn_cli.evaluation.run import evaluate_folder
from dpn_cli.intervals import Estimate, bootstrap_mean
from dpn_cli.parallel.processes import ALONE

OUT_OF_REACH, HEALED = "out of reach", f"{Routed.name}, healed"


@dataclass(frozen=True)
class Verdict:
    """The pyramid beside the best baselines at a budget.

    Attributes:
        budget: mean fraction of the prefill FLOPs that was asked for.
        agreeing: the baseline that agrees best.
        agreement: how much more of the answer tokens the pyramid agrees on.
        nearest: the baseline with the least KL.
        distortion: how much less KL the pyramid has.
        word: best, tied, beaten or out of reach.
    """

    budget: float
    agreeing: str = ""
    agreement: Estimate | None = None
    nearest: str = ""
    distortion: Estimate | None = None
    word: str = OUT_OF_REACH

    @classmethod
    def of(cls, budget: float, results: Sequence[Result]) -> "Verdict":
        """Compare the pyramid at a budget with the others at any, where it is among the results."""
        pyramid = pyramid_at(budget, results)
        if pyramid is None:
            return cls(budget)
        limit = pyramid.figures.fraction + TOLERANCE
        others = [
            each
            for each in results
            if each.budget is not None and each.method != Routed.name and each.figures.fraction <= limit
        ]
        if not others:
            return cls(budget, word="best: no other method spends so little")
        agreeing = max(others, key=lambda each: each.figures.agreement.value)
        nearest = min(others, key=lambda each: each.figures.distortion.value)
        more = gain(pyramid, agreeing, "agreement", 1)
        less = gain(pyramid, nearest, "distortion", -1)
        ahead, behind = more.low > 0 or less.low > 0, more.high < 0 or less.high < 0
        word = "tied" if ahead == behind else "best" if ahead else "beaten"
        return cls(budget, label_at(budget, agreeing), more, label_at(budget, nearest), less, word)

    def cells(self) -> tuple[str, ...]:
        """Return the row of the printed table."""
        more = "" if self.agreement is None else show(self.agreement, ".2f", 100)
        less = "" if self.distortion is None else show(self.distortion, ".5f")
        return (f"{self.budget:g}", self.word, self.agreeing, more, self.nearest, less)


def pyramid_at(budget: float, results: Sequence[Result]) -> Result | None:
    """Return the pyramid at a budget, where it is among the results."""
    return next((each for each in results if each.method == Routed.name and each.budget == budget), None)


def label_at(budget: float, result: Result) -> str:
    """Return the label of a method in a comparison at a budget, which may not be its own."""
    return result.label if result.budget == budget else f"{result.label} at {result.budget:g}"


def gain(pyramid: Result, other: Result, quantity: str, sign: int) -> Estimate:
    """Return by how much the pyramid is better than another method, sample by sample."""
    pairs = zip(pyramid.per_sample, other.per_sample, strict=True)
    return bootstrap_mean([sign * (getattr(ours, quantity) - getattr(theirs, quantity)) for ours, theirs in pairs])


def hard_samples(results: Sequence[Result]) -> list[int]:
    """Return of which samples smaller pictures get an answer token wrong; none where they are out of reach."""
    smaller = next((each for each in results if each.method == ImageDownsampling.name), None)
    return [] if smaller is None else [i for i, each in enumerate(smaller.per_sample) if each.agreement < 1]


def row(budget: float, name: str, result: Result, hard: Sequence[int]) -> tuple[str, ...]:
    """Return a line of the table of all methods."""
    figures = result.figures
    accuracy = "" if figures.accuracy is None else show(figures.accuracy.score, ".1f", 100)
    agreement, kl = show(figures.agreement, ".2f", 100), show(figures.distortion, ".4f")
    over = result.fraction_over_dpn or 0
    spent = f"{figures.fraction:.3f}" + (f" ({over:+.3f})" if abs(over) > TOLERANCE else "")
    on_hard = f"{100 * fmean(result.per_sample[i].agreement for i in hard):.1f}" if hard else ""
    return (f"{budget:g}", name, spent, agreement, on_hard, kl, accuracy)


def table(plain: Evaluation, healed: Evaluation | None, budgets: Sequence[float]) -> list[tuple[str, ...]]:
    """Return one block of rows per budget, the pyramids first, and last what cannot spend so little."""
    rows = [row(1.0, plain.results[0].label, plain.results[0], ())]
    for budget in budgets:
        here = [result for result in plain.results if result.budget == budget]
        hard = hard_samples(here)
        after = [result for result in healed.pyramids if result.budget == budget] if healed else []
        rows += [row(budget, result.label, result, hard) for result in here if result.method == Routed.name]
        rows += [row(budget, HEALED, result, hard) for result in after]
        rows += [row(budget, result.label, result, hard) for result in here if result.method != Routed.name]
        rows += [
            (f"{budget:g}", each.method, OUT_OF_REACH, *[""] * 4) for each in plain.left_out if each.budget == budget
        ]
    return rows


def kinds_table(plain: Evaluation, verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Return one row per kind of question: the pyramid's agreement at every budget, and that of who agrees best."""
    pairs = []
    for verdict in verdicts:
        named = {label_at(verdict.budget, each): each for each in plain.results if each.budget is not None}
        pair = (pyramid_at(verdict.budget, plain.results), named.get(verdict.agreeing))
        pairs.append([each for each in pair if each is not None])
    return [
        (kind, *(" / ".join(f"{100 * each.kinds[kind].agreement.value:.1f}" for each in pair) for pair in pairs))
        for kind in plain.results[0].kinds
    ]


def calibrated_demo(folder: Path, samples: int | None, budget: float) -> Path:
    """Convert and calibrate the demo; return its folder."""
    converted = folder / "demo-dpn"
    convert("demo", output=converted)
    options = {"budget": budget} | ({} if samples is None else {"samples": samples})
    recipe = calibration_recipe(converted, (), options)
    calibrate(converted, DataOptions("demo"), recipe, console.REPORTER, processes=ALONE)
    return converted


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="A calibrated folder; default: the demo is calibrated.")
@click.option("--calibration-samples", type=int, help="For the demo that is calibrated; default: the recipe's.")
@click.option("--healed", type=click.Path(path_type=Path), help="The same model, calibrated with --heal lora.")
@click.option("--data", default="demo", show_default=True)
@click.option("--image-root", type=click.Path(path_type=Path))
@click.option("--budget", "budgets", type=float, multiple=True, default=BUDGETS, show_default=True)
@click.option("--samples", default=700, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--max-new-tokens", default=4, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw KL over FLOPs here.")
def main(
    model: Path | None,
    calibration_samples: int | None,
    healed: Path | None,
    data: str,
    image_root: Path | None,
    budgets: tuple[float, ...],
    samples: int,
    batch_size: int,
    max_new_tokens: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Print all methods, the pyramid beside the best baselines, and both by kind of question."""

    def run(folder: Path, against: tuple[str, ...]) -> Evaluation:
        options = EvaluationOptions(
            budgets, against=against, samples=samples, answer_tokens=max_new_tokens, batch_size=batch_size
        )
        evaluation = evaluate_folder(folder, DataOptions(data, image_root), options, console.REPORTER, ALONE)
        assert evaluation is not None, "alone, this process is the main one"
        return evaluation

    with TemporaryDirectory() as temporary:
        plain = run(model or calibrated_demo(Path(temporary), calibration_samples, budgets[0]), BASELINES)
    after = run(healed, ()) if healed else None
    verdicts = [Verdict.of(budget, plain.results) for budget in budgets]
    if json_file:
        found = {"plain": plain.to_dict(), "healed": after and after.to_dict(), "verdicts": list(map(asdict, verdicts))}
        json_file.write_text(json.dumps(found, indent=2), encoding="utf-8")
    if plot:
        pair = (plain, after) if after else (plain,)
        plot_evaluation(plot, *pair, names=(Routed.name, HEALED)[: len(pair)])
    columns = ["budget", "method", "FLOPs (over dpn's)", "agreement, % (95%)", "hard, %", "KL, nats (95%)"]
    columns += ["accuracy, % (95%)"]
    console.table(f"{len(plain.questions)} held-out samples", columns, table(plain, after, budgets), texts=["method"])
    for reason in plain.left_out:
        console.note(f"Left out: {reason}")
    columns = ["budget", "dpn is", "agrees best", "dpn's agreement, less its, %", "least KL", "its KL, less dpn's"]
    console.table("dpn beside the best baselines", columns, [each.cells() for each in verdicts], texts=columns[1:])
    if len(plain.results[0].kinds) > 1:
        columns = ["kind", *(f"at {budget:g}" for budget in budgets)]
        kinds = kinds_table(plain, verdicts)
        console.table("agreement by kind, %: dpn / who agrees best of the others", columns, kinds, texts=["kind"])


if __name__ == "__main__":
    main()
