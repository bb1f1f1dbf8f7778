"""`dpn eval`: what the pyramid lost and gained, and whether another method would have been better."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpn_cli import console
from dpn_cli.commands.completion import listed
from dpn_cli.commands.data_options import data_options
from dpn_cli.commands.numbers import Fraction, WholeNumber
from dpn_cli.commands.options import (
    SAMPLES,
    SEED,
    Choice,
    baseline_names,
    checkpoint_folder,
    dtype_option,
    given_options,
    model_option,
    processes_option,
    together,
    wide_option,
)
from dpn_cli.data.metrics import METRICS
from dpn_cli.errors import UsageError
from dpn_cli.evaluation.baselines import BASELINES
from dpn_cli.evaluation.harness import PAPER_TASKS
from dpn_cli.extras import extra
from dpn_cli.parallel.launch import is_launched

if TYPE_CHECKING:
    from dpn_cli.data.options import DataOptions
    from dpn_cli.evaluation.evaluate import Evaluation


_OF_QUESTIONS = ("metric", "seed", "max_new_tokens", "plot", "wide")  # options that say nothing about benchmarks


@click.command("eval")
@model_option
@partial(data_options, required=False)
@click.option(
    "--tasks", metavar="TASK,TASK,…",
    help="Public benchmarks instead of --data, by their names in lmms-eval; `paper` stands for "
    f"{', '.join(PAPER_TASKS)}.",
)  # fmt: skip
@click.option(
    "--include-path", type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="With --tasks: a folder with tasks of your own.",
)  # fmt: skip
@click.option(
    "--budget", "budgets", type=Fraction(), multiple=True,
    help="Mean fraction of the original's prefill FLOPs to spend; repeatable; default: what the checkpoint is set to.",
)  # fmt: skip
@click.option(
    "--route", "routes", metavar="ROUTE", multiple=True,
    help="Also evaluate one fixed route for all samples: one expert per site, such as keep,keep,2x2,keep,exit; "
    "repeatable.",
)  # fmt: skip
@click.option(
    "--against", metavar="NAME,NAME,…", default="", shell_complete=listed(lambda: (*BASELINES, "all")),
    help=f"Other methods to compare with, at equal FLOPs: {', '.join(BASELINES)}, or all.",
)  # fmt: skip
@click.option(
    "--metric", type=Choice(list(METRICS)), default="exact", show_default=True,
    help="How answers are scored against labels: "
    + ", ".join(f"{name} ({metric.description})" for name, metric in METRICS.items()) + ".",
)  # fmt: skip
@click.option(
    "--by",
    metavar="FIELD",
    help="The data field to group figures by; default: kind, if there is one.",
)
@click.option("--samples", type=SAMPLES, help="Number of samples to draw; default: all (512 of the demo).")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed for sampling.")
@click.option(
    "--max-new-tokens",
    type=WholeNumber(1),
    default=32,
    show_default=True,
    help="Maximum number of tokens per answer.",
)
@click.option("--batch-size", type=WholeNumber(1), default=8, show_default=True, help="Samples per forward pass.")
@dtype_option("auto")
@processes_option
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Plot KL against FLOPs into a .png, .svg or .pdf file, which is replaced if it exists.",
)
@wide_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: Path | None,
    data: "DataOptions | None",
    tasks: str | None,
    include_path: Path | None,
    budgets: tuple[float, ...],
    routes: tuple[str, ...],
    against: str,
    metric: str,
    by: str | None,
    samples: int | None,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    dtype: str,
    plot: Path | None,
    wide: bool,
    as_json: bool,
) -> None:
    """Compare the pyramid with the original model, and with other methods at equal FLOPs.

    Use data that calibration has not seen; `demo` draws from its held-out pictures. After a kill or Ctrl-C, run the
    same command line again to go on, with any number of processes.

    With --tasks, lmms-eval asks the questions: the original once, and the pyramid once at every budget.
    """
    with together():
        names = baseline_names(against)
        _check_request(data, tasks, (*names, *routes), by)
        folder = checkpoint_folder(model)
        if data is not None and plot is not None:
            from dpn_cli.evaluation.plots import check_plot

            check_plot(plot)
    if data is None:
        _run_benchmarks(folder, tasks or "", budgets, batch_size, dtype, samples, include_path, as_json)
        return
    with console.waiting("starting"):
        from dpn_cli.commands.tables.evaluation import print_evaluation
        from dpn_cli.evaluation.drawing import plot_evaluation
        from dpn_cli.evaluation.options import EvaluationOptions
        from dpn_cli.evaluation.run import evaluate_folder

    options = EvaluationOptions(
        budgets=budgets, routes=routes, against=names, metric=metric, samples=samples, seed=seed,
        answer_tokens=max_new_tokens, batch_size=batch_size, dtype=dtype,
    )  # fmt: skip
    about = {"checkpoint": str(folder), "data": data.name}

    def deliver(result: "Evaluation") -> None:
        try:
            if as_json:
                console.print_json(about | result.to_dict())
            else:
                print_evaluation(result, wide)
        finally:
            if plot is not None:
                with extra(f"the picture {plot} is not drawn"):
                    plot_evaluation(plot, result)
                console.note(f"Picture: {plot}")

    try:
        evaluate_folder(folder, replace(data, kind_field=by), options, console.REPORTER, deliver=deliver)
    except KeyboardInterrupt:
        console.note("Nothing that was measured is lost: run the same command line again to go on.")
        raise


def _check_request(data: "DataOptions | None", tasks: str | None, others: Sequence[str], by: str | None) -> None:
    """Check that the options say what is to be asked, and go together.

    Raises:
        UsageError: if they do not.
    """
    if (data is None) == (tasks is None):
        given = "not both" if data else "of which neither is given"
        raise UsageError(f"pass --data for questions of your own, or --tasks for public benchmarks, {given}")
    if tasks is not None and others:
        raise UsageError("--tasks compares the pyramid with its teacher alone: leave out --against and --route")
    if tasks is not None and by is not None:
        raise UsageError("--tasks has groups of its own: leave out --by")
    if tasks is not None and (idle := given_options(_OF_QUESTIONS)):
        raise UsageError(f"--tasks asks, scores and prints in its own way: leave out {', '.join(idle)}")
    if data is not None and (idle := given_options(["include_path"])):
        raise UsageError(f"{idle[0]} is a folder of --tasks: leave it out")
    if tasks is not None and is_launched():
        raise UsageError(
            "--tasks runs in one process; for several:  "
            "PYTHONSAFEPATH=1 accelerate launch -m lmms_eval eval --model dpn …"
        )


def _run_benchmarks(
    folder: Path,
    tasks: str,
    budgets: Sequence[float],
    batch_size: int,
    dtype: str,
    samples: int | None,
    include_path: Path | None,
    as_json: bool,
) -> None:
    """Let lmms-eval put the questions, to the teacher and to the pyramid."""
    from dpn_cli.checkpoint.layout import open_converted
    from dpn_cli.evaluation.harness import run_benchmarks, spendings
    from dpn_cli.evaluation.spending import unmet
    from dpn_cli.pyramid.reach import validate_in_table

    names = [
        name for task in tasks.split(",") for name in (PAPER_TASKS if task == "paper" else (task.strip(),)) if name
    ]
    pyramid = open_converted(folder)[2]
    validate_in_table(budgets, pyramid)
    rows = run_benchmarks(folder, names, budgets, batch_size, samples, include_path, console.note, dtype)
    spent = spendings(rows, budgets, pyramid.budget)
    for line in unmet(spent, pyramid, folder, data=None):
        console.note(line)
    if as_json:
        found = {
            "checkpoint": str(folder),
            "benchmarks": [row.to_dict() for row in rows],
            "budgets": [each.to_dict() for each in spent],
        }
        console.print_json(found)
        return
    from dpn_cli.commands.tables.evaluation import print_benchmarks

    print_benchmarks(rows)
