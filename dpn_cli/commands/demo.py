"""`dpn demo`: the whole job on the embedded teacher, ending in a table."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import click

from dpn_cli import console
from dpn_cli.commands.options import Fraction

BATCH_SIZE = 32


@click.command("demo")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("dpn-demo"), show_default=True,
    help="The folder to work in.",
)  # fmt: skip
@click.option(
    "--budget", type=Fraction(), default=0.25, show_default=True, help="Mean fraction of prefill FLOPs to spend."
)
@click.option("--samples", type=click.IntRange(min=16), help="Calibration samples; default: the recipe's.")
@click.option(
    "--questions",
    type=click.IntRange(min=1),
    default=700,
    show_default=True,
    help="Held-out questions to ask.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(output: Path, budget: float, samples: int | None, questions: int, as_json: bool) -> None:
    """Convert, calibrate, export and evaluate a small embedded LLaVA on pictures that it has never seen."""
    from dpn_cli.conversion.convert import convert

    started = time.monotonic()
    converted, exported = output / "demo-dpn", output / "demo-dpn-export"
    console.note(f"1/4 dpn convert demo --output {converted}")
    convert("demo", output=converted, force=True)

    from dpn_cli.calibration.calibrate import calibrate
    from dpn_cli.calibration.settings import calibration_recipe
    from dpn_cli.commands.tables import print_calibration, print_fidelity, print_routes
    from dpn_cli.data.options import DataOptions
    from dpn_cli.evaluation.options import EvaluationOptions
    from dpn_cli.evaluation.run import evaluate_folder
    from dpn_cli.exporting.export import export
    from dpn_cli.parallel.processes import ALONE
    from dpn_cli.reporter import Reporter

    console.note(f"2/4 dpn calibrate --model {converted} --data demo --budget {budget:g}")
    options = {"budget": budget} | ({} if samples is None else {"samples": samples})
    recipe = calibration_recipe(converted, (), options)
    report = calibrate(converted, DataOptions("demo"), recipe, console.REPORTER, processes=ALONE)
    assert report is not None, "alone, this process is the main one"
    if not as_json:
        print_calibration(report)

    console.note(f"3/4 dpn export --model {converted} --output {exported}")
    export(converted, exported, force=True)

    console.note(f"4/4 {questions} held-out questions, answered by the export and by its teacher")
    asked = EvaluationOptions(samples=questions, answer_tokens=recipe.answer_tokens, batch_size=BATCH_SIZE)
    result = evaluate_folder(exported, DataOptions("demo"), asked, Reporter(progress=console.progress), ALONE)
    assert result is not None, "alone, this process is the main one"
    [pyramid] = result.of("dpn")
    groups = {**pyramid.kinds, "all": pyramid.figures}
    if as_json:
        kinds = {kind: asdict(figures) for kind, figures in groups.items()}
        console.echo(json.dumps({"calibration": report.to_dict(), "kinds": kinds}, indent=2, ensure_ascii=False))
    else:
        print_fidelity(f"The demo teacher at budget {budget:g}, on held-out pictures", groups)
        print_routes(result, report.experts)
    accuracy = pyramid.figures.accuracy
    assert accuracy is not None
    console.note(
        f"The pyramid keeps {accuracy.score.value / accuracy.teacher:.1%} of the teacher's accuracy "
        f"at {pyramid.figures.fraction:.1%} of its prefill FLOPs ({time.monotonic() - started:.0f} s in all)."
    )
