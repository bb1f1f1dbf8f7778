"""What does healing bring? Accuracy and agreement on held-out questions, at some budgets, with and without it.

Calibrate one checkpoint twice, then compare the two:

    dpn convert demo --output plain && dpn calibrate --model plain --data demo --budget 0.44
    dpn convert demo --output healed && dpn calibrate --model healed --data demo --budget 0.44 --heal lora
    python benchmarks/healing.py --model plain --model healed

Every answer is greedy, and right where it is the label, as VQA compares; agreement is with the same model's own answer
where it pools nothing and no adapter is on.
"""

import json
from dataclasses import asdict
from pathlib import Path

import click

from dpn_cli import console
from dpn_cli.data.options import DataOptions
from dpn_cli.evaluation.figures import Figures
from dpn_cli.evaluation.options import EvaluationOptions
from dpn_cli.evaluation.run import evaluate_folder
from dpn_cli.parallel.processes import ALONE

BATCH_SIZE = 32
NEW_TOKENS = 4  # of the demo's one-word answers


@click.command()
@click.option("--model", "models", type=click.Path(path_type=Path), multiple=True, required=True, help="Repeatable.")
@click.option("--data", default="demo", show_default=True)
@click.option("--questions", default=700, show_default=True)
@click.option("--budget", "budgets", type=float, multiple=True, default=(0.44, 0.4, 1.0), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(models: tuple[Path, ...], data: str, questions: int, budgets: tuple[float, ...], as_json: bool) -> None:
    """Ask every model the held-out questions at every budget."""
    figures: dict[tuple[str, float], Figures] = {}
    options = EvaluationOptions(budgets, samples=questions, answer_tokens=NEW_TOKENS, batch_size=BATCH_SIZE)
    for folder in models:
        evaluation = evaluate_folder(folder, DataOptions(data), options, console.REPORTER, ALONE)
        assert evaluation is not None, "alone, this process is the main one"
        figures |= {(str(folder), result.budget or 1.0): result.figures for result in evaluation.of("dpn")}
    if as_json:
        click.echo(json.dumps([{"model": m, "budget": b, **asdict(f)} for (m, b), f in figures.items()], indent=2))
        return
    rows = [
        (
            model, f"{budget:g}", f"{f.fraction:.3f}", f"{f.accuracy.teacher:.1%}", f"{f.accuracy.score.value:.1%}",
            f"{f.same_answer.value:.1%}",
        )
        for (model, budget), f in figures.items()
        if f.accuracy
    ]  # fmt: skip
    columns = ["model", "budget", "FLOPs", "teacher", "pyramid", "same answer"]
    console.table(f"{questions} held-out questions", columns, rows)


if __name__ == "__main__":
    main()
