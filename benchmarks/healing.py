"""What does healing bring? Accuracy and agreement on held-out questions, at some budgets, with and without it.

Calibrate one checkpoint twice, then compare the two:

    dpn convert demo --output plain && dpn calibrate --model plain --data demo --budget 0.44
    dpn convert demo --output healed && dpn calibrate --model healed --data demo --budget 0.44 --heal lora
    python benchmarks/healing.py --model plain --model healed

Every answer is greedy, and right where it is the label, spelling aside; agreement is with the same model's own answer
where it pools nothing and no adapter is on.
"""

import json
from dataclasses import asdict
from pathlib import Path

import click

from dpn_cli import console
from dpn_cli.calibration.data import load_data
from dpn_cli.evaluation.fidelity import Fidelity, compare_answers
from dpn_cli.modeling.loading import default_device, load_model, load_processor

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
    samples = load_data(data, split="heldout", limit=questions).samples
    figures: dict[tuple[str, float], Fidelity] = {}
    for folder in models:
        model = load_model(folder, device_map=default_device())
        processor = load_processor(folder)
        for budget in budgets:
            model.set_budget(budget)
            with console.progress(f"{folder.name} at {budget:g}", len(samples)) as advance:
                answers = compare_answers(model, processor, samples, BATCH_SIZE, NEW_TOKENS, advance)
            figures[str(folder), budget] = Fidelity.of(answers)
    if as_json:
        click.echo(json.dumps([{"model": m, "budget": b, **asdict(f)} for (m, b), f in figures.items()], indent=2))
        return
    rows = [
        (
            model, f"{budget:g}", f"{f.fraction:.3f}", f"{f.teacher_accuracy:.1%}", f"{f.student_accuracy:.1%}",
            f"{f.agreement:.1%}",
        )
        for (model, budget), f in figures.items()
    ]  # fmt: skip
    columns = ["model", "budget", "FLOPs", "teacher", "pyramid", "same answer"]
    console.table(f"{len(samples)} held-out questions", columns, rows)


if __name__ == "__main__":
    main()
