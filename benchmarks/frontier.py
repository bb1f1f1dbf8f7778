"""What would another method have given for the same compute? The pyramid and other methods, budget by budget.

Run it on a calibrated folder, and on one that was healed from the same model if there is one:

    python benchmarks/frontier.py --model dpn-demo/demo-dpn --healed healed-dpn --data demo --samples 700

All methods answer the same held-out samples and spend what the pyramid spends on them; where one cannot, the verdict
says so. The teacher is the original, and the other methods run on its weights. Intervals are 95%, of a paired bootstrap
over the samples.
"""

import json
from pathlib import Path

import click

from dpn_cli import console
from dpn_cli.data.options import DataOptions
from dpn_cli.evaluation.baselines import BASELINES
from dpn_cli.evaluation.baselines.baseline import TOLERANCE
from dpn_cli.evaluation.drawing import plot_evaluation
from dpn_cli.evaluation.evaluate import Evaluation, Result
from dpn_cli.evaluation.options import EvaluationOptions
from dpn_cli.evaluation.run import evaluate_folder
from dpn_cli.intervals import Estimate, bootstrap_mean
from dpn_cli.parallel.processes import ALONE

BUDGETS = (0.8, 0.65, 0.5, 0.44, 0.36)


def over(result: Result, pyramid: Result) -> Estimate:
    """Return how much more KL a method has than the pyramid, sample by sample."""
    pairs = zip(result.per_sample, pyramid.per_sample, strict=True)
    return bootstrap_mean([theirs.distortion - ours.distortion for theirs, ours in pairs])


def verdict(result: Result, pyramid: Result | None) -> str:
    """Say whether a method is better or worse than the pyramid, or tied with it, and if it spent more or less."""
    if pyramid is None or result is pyramid:
        return ""
    difference, flops = over(result, pyramid), result.figures.fraction - pyramid.figures.fraction
    word = "tied" if not difference.excludes_zero else "worse" if difference.low > 0 else "better"
    return word if abs(flops) <= TOLERANCE else f"{word}, for {flops:+.3f} of the FLOPs"


def show(estimate: Estimate, scale: float, digits: int) -> str:
    """Return an estimate and its interval."""
    value, low, high = (f"{scale * number:.{digits}f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} … {high})"


def row(budget: float, name: str, result: Result, pyramid: Result | None) -> tuple[str, ...]:
    """Return a line of the table."""
    figures = result.figures
    accuracy = "" if figures.accuracy is None else show(figures.accuracy.score, 100, 1)
    kl = show(figures.distortion, 1, 4)
    return (f"{budget:g}", name, f"{figures.fraction:.3f}", kl, accuracy, verdict(result, pyramid))


def table(plain: Evaluation, healed: Evaluation | None) -> list[tuple[str, ...]]:
    """Return one block of rows per budget, the pyramids first."""
    rows = [row(1.0, "original", plain.results[0], None)]
    for budget in BUDGETS:
        here = [result for result in plain.results if result.budget == budget]
        pyramid = next((result for result in here if result.method == "dpn"), None)
        after = [s for s in healed.of("dpn") if s.budget == budget] if healed else []
        rows += [row(budget, "dpn", pyramid, None)] if pyramid else []
        rows += [row(budget, "dpn, healed", result, pyramid) for result in after]
        rows += [row(budget, result.label, result, pyramid) for result in here if result is not pyramid]
    return rows


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="A calibrated folder.")
@click.option("--healed", type=click.Path(path_type=Path), help="The same model, calibrated with --heal lora.")
@click.option("--data", default="demo", show_default=True)
@click.option("--samples", default=700, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--max-new-tokens", default=4, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw KL over FLOPs here.")
def main(
    model: Path,
    healed: Path | None,
    data: str,
    samples: int,
    batch_size: int,
    max_new_tokens: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Print the table, one block of rows per budget."""

    def run(folder: Path, against: tuple[str, ...]) -> Evaluation:
        options = EvaluationOptions(
            BUDGETS, against, samples=samples, answer_tokens=max_new_tokens, batch_size=batch_size
        )
        evaluation = evaluate_folder(folder, DataOptions(data), options, console.REPORTER, ALONE)
        assert evaluation is not None, "alone, this process is the main one"
        return evaluation

    plain = run(model, BASELINES)
    after = run(healed, ()) if healed else None
    if json_file:
        results = {"plain": plain.to_dict(), "healed": after and after.to_dict()}
        json_file.write_text(json.dumps(results, indent=2), encoding="utf-8")
    if plot:
        pair = (plain, after) if after else (plain,)
        plot_evaluation(plot, *pair, names=("dpn", "dpn, healed")[: len(pair)])
    columns = ["budget", "method", "FLOPs", "KL, nats (95%)", "accuracy, % (95%)", "KL beside dpn"]
    console.table(f"{len(plain.questions)} held-out samples", columns, table(plain, after), texts=["method"])
    for reason in plain.left_out:
        console.note(f"Left out: {reason}")


if __name__ == "__main__":
    main()
