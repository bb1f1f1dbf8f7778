"""`dpn demo`: the whole job on the embedded teacher, ending in a table."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpn_cli import console, workspace
from dpn_cli.commands.numbers import Fraction, WholeNumber
from dpn_cli.commands.options import SAMPLES
from dpn_cli.commands.replaced import in_place_of
from dpn_cli.commands.tables.calibration import print_calibration
from dpn_cli.commands.tables.evaluation import print_fidelity, print_routes
from dpn_cli.extras import extra
from dpn_cli.limits import MAX_SAMPLES

if TYPE_CHECKING:
    from dpn_cli.calibration.reporting.report import Report
    from dpn_cli.evaluation.bench import Bench
    from dpn_cli.evaluation.evaluate import Evaluation
    from dpn_cli.evaluation.figures import Figures

BATCH_SIZE = 32
TIMED_BATCH, TIMED_ROUNDS = 8, 7


@click.command("demo")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("dpn-demo"), show_default=True,
    help="The folder to work in.",
)  # fmt: skip
@click.option(
    "--budget",
    type=Fraction(),
    default=0.25,
    show_default=True,
    help="Mean fraction of the original's prefill FLOPs to spend.",
)
@click.option(
    "--samples", type=WholeNumber(16, MAX_SAMPLES), help="Number of calibration samples; default: the recipe's."
)
@click.option(
    "--questions",
    type=SAMPLES,
    default=192,
    show_default=True,
    help="Number of held-out questions to ask.",
)
@click.option("-f", "--force", is_flag=True, help="Replace the checkpoints of an earlier demo.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(output: Path, budget: float, samples: int | None, questions: int, force: bool, as_json: bool) -> None:
    """Convert, calibrate, export and evaluate a small embedded LLaVA on pictures that it has never seen."""
    from dpn_cli.checkpoint.staging import check_target
    from dpn_cli.conversion.convert import convert
    from dpn_cli.families.family import CONVERTED

    started = time.monotonic()
    converted, exported = output / "demo-dpn", output / "demo-dpn-export"
    workspace.check_state_folder()
    for folder in (converted, exported):
        check_target(folder, force, CONVERTED)
        if replaced := in_place_of(folder):
            console.note(f"--force: {folder} will be written{replaced}.")
    console.note(f"1/4 dpn convert demo --output {converted}")
    with console.waiting("converting"):
        convert("demo", output=converted, force=force, reporter=console.REPORTER)

    report = _calibrated(converted, budget, samples)
    with extra(f"{workspace.FOLDER} cannot be written here"):
        workspace.remember(converted)
    if not as_json:
        print_calibration(report)

    from dpn_cli.exporting.export import export

    console.note(f"3/4 dpn export --model {converted} --output {exported}")
    with console.waiting("exporting"):
        export(converted, exported, force=force, reporter=console.REPORTER)

    console.note(f"4/4 {questions} held-out questions, answered by the export and by the original")
    result, timed = _asked(exported, questions, report.settings["answer_tokens"])
    [pyramid] = result.pyramids
    groups = {**pyramid.kinds, "all": pyramid.figures}
    if as_json:
        kinds = {kind: asdict(figures) for kind, figures in groups.items()}
        found = {"calibration": report.to_dict(), "kinds": kinds, "latency": timed.to_dict()}
        console.print_json(found)
    else:
        print_fidelity(f"The demo teacher at budget {budget:g}, on held-out pictures", groups)
        print_routes(result, report.experts)
    _sum_up(pyramid.figures, timed, time.monotonic() - started)
    console.note(
        f"{converted / 'calibration' / 'report.html'} shows which experts were chosen and why, "
        f"{exported / 'evaluation' / 'report.html'} which answers changed."
    )


def _calibrated(folder: Path, budget: float, samples: int | None) -> "Report":
    """Calibrate on the demo's pictures."""
    with console.waiting("starting"):
        from dpn_cli.calibration.calibrate import calibrate
        from dpn_cli.calibration.settings import calibration_recipe
        from dpn_cli.data.options import DataOptions
        from dpn_cli.parallel.processes import ALONE

    console.note(f"2/4 dpn calibrate --model {folder} --data demo --budget {budget:g}")
    options = {"budget": budget} | ({} if samples is None else {"samples": samples})
    recipe = calibration_recipe(folder, (), options)
    report = calibrate(folder, DataOptions("demo"), recipe, console.REPORTER, processes=ALONE)
    assert report is not None, "alone, this process is the main one"
    return report


def _asked(folder: Path, questions: int, answer_tokens: int) -> "tuple[Evaluation, Bench]":
    """Ask the export and the original, and time both."""
    from dpn_cli.data.options import DataOptions
    from dpn_cli.evaluation.bench import BenchOptions, bench_folder
    from dpn_cli.evaluation.options import EvaluationOptions
    from dpn_cli.evaluation.run import evaluate_folder
    from dpn_cli.inference.threads import one_thread
    from dpn_cli.parallel.processes import ALONE
    from dpn_cli.reporter import Reporter

    progress = Reporter(progress=console.progress, waiting=console.waiting)
    asked = EvaluationOptions(samples=questions, answer_tokens=answer_tokens, batch_size=BATCH_SIZE)
    result = evaluate_folder(folder, DataOptions("demo"), asked, progress, ALONE)
    assert result is not None, "alone, this process is the main one"
    timed = BenchOptions(batch_sizes=(TIMED_BATCH,), rounds=TIMED_ROUNDS, new_tokens=2)
    with one_thread():  # so small a model only waits for more of them
        return result, bench_folder(folder, DataOptions("demo"), timed, progress)


def _sum_up(figures: "Figures", timed: "Bench", seconds: float) -> None:
    """Say what is kept, for how much, and how fast."""
    accuracy, prefill = figures.accuracy, timed.results[0].measurements[1].phases["prefill"]
    assert accuracy is not None
    console.note(
        f"The pyramid keeps {accuracy.score.value / accuracy.teacher:.1%} of the original's accuracy at "
        f"{figures.fraction:.1%} of its prefill FLOPs. Measured here on one thread in batches of {TIMED_BATCH}, its "
        f"prefill is {prefill.speedup:.2f} times as fast (95% interval {prefill.speedup_low:.2f} to "
        f"{prefill.speedup_high:.2f}). The demo took {seconds:.0f} s."
    )
