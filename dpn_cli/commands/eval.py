"""`dpn eval`: what the pyramid lost and gained, and whether another method would have been better."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpn_cli import console
from dpn_cli.commands.options import (
    Choice,
    Fraction,
    checkpoint_folder,
    contender_names,
    data_options,
    model_option,
    processes_option,
    together,
)
from dpn_cli.errors import UsageError
from dpn_cli.evaluation.contenders import CONTENDERS
from dpn_cli.evaluation.harness import PAPER_TASKS
from dpn_cli.evaluation.metrics import METRICS
from dpn_cli.parallel.launch import is_launched

if TYPE_CHECKING:
    from dpn_cli.data.loading import OnBadRow


@click.command("eval")
@model_option
@partial(data_options, required=False)
@click.option(
    "--tasks", metavar="TASK,TASK,…",
    help=f"In place of --data: public benchmarks, by their names in lmms-eval; paper for {', '.join(PAPER_TASKS)}.",
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
    "--against", metavar="NAME,NAME,…", default="",
    help=f"Let other methods answer for the same FLOPs: {', '.join(CONTENDERS)}, or all.",
)  # fmt: skip
@click.option(
    "--metric", type=Choice(list(METRICS)), default="exact", show_default=True,
    help="How answers are scored by labels: "
    + ", ".join(f"{name} ({metric.description})" for name, metric in METRICS.items()) + ".",
)  # fmt: skip
@click.option(
    "--by",
    "kind_field",
    metavar="FIELD",
    help="The data's field to group figures by; default: kind, where there is one.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Samples to draw; default: all, of the demo 512.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draw.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Per answer.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Samples per forward pass.")
@processes_option
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Draw KL over FLOPs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: Path | None,
    data: str | None,
    tasks: str | None,
    include_path: Path | None,
    image_root: Path | None,
    ignored: tuple[str, ...],
    on_bad_row: "OnBadRow",
    max_bad: float,
    budgets: tuple[float, ...],
    against: str,
    metric: str,
    kind_field: str | None,
    samples: int | None,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare the pyramid with its teacher, the model that pools nothing, and with other methods at equal FLOPs.

    Use data that calibration has not seen; `demo` draws from its held-out pictures. After a kill or Ctrl-C, the same
    command line goes on where it stopped, with any number of processes.

    With --tasks the program lmms-eval asks, once the teacher and once the pyramid at every budget.
    """
    with together():
        names = contender_names(against)
        _check_request(data, tasks, names, kind_field)
        folder = checkpoint_folder(model)
        if data is not None and plot is not None:
            from dpn_cli.evaluation.plots import check_plot

            check_plot(plot)
    if data is None:
        _run_benchmarks(folder, tasks or "", budgets, batch_size, samples, include_path, as_json)
        return
    from dpn_cli.evaluation.pictures import plot_evaluation
    from dpn_cli.evaluation.run import evaluate_folder

    try:
        result = evaluate_folder(
            folder, data, image_root, on_bad_row, max_bad, ignored=ignored,
            budgets=budgets, against=names, metric=metric, kind_field=kind_field, samples=samples, seed=seed,
            answer_tokens=max_new_tokens, batch_size=batch_size, progress=console.progress, say=console.note,
        )  # fmt: skip
    except KeyboardInterrupt:
        console.note("What was found is kept: the same command line goes on from there.")
        raise
    if result is None:
        return
    if plot is not None:
        plot_evaluation(plot, result)
    if as_json:
        console.echo(
            json.dumps({"checkpoint": str(folder), "data": data} | result.to_dict(), indent=2, ensure_ascii=False)
        )
        return
    from dpn_cli.commands.tables import print_evaluation

    print_evaluation(result)


def _check_request(data: str | None, tasks: str | None, against: Sequence[str], kind_field: str | None) -> None:
    """Check that the options say what is to be asked, and go together.

    Raises:
        UsageError: if they do not.
    """
    if (data is None) == (tasks is None):
        raise UsageError("say what is to be asked: --data for questions of your own, or --tasks for public benchmarks")
    if tasks is not None and against:
        raise UsageError("--tasks compares the pyramid with its teacher alone: leave out --against")
    if tasks is not None and kind_field is not None:
        raise UsageError("--tasks has groups of its own: leave out --by")
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
    samples: int | None,
    include_path: Path | None,
    as_json: bool,
) -> None:
    """Let lmms-eval put the questions, to the teacher and to the pyramid."""
    from dpn_cli.checkpoint.layout import open_converted
    from dpn_cli.evaluation.harness import run_benchmarks, spendings
    from dpn_cli.evaluation.spending import unmet

    names = [
        name for task in tasks.split(",") for name in (PAPER_TASKS if task == "paper" else (task.strip(),)) if name
    ]
    rows = run_benchmarks(folder, names, budgets, batch_size, samples, include_path, console.note)
    pyramid = open_converted(folder)[2]
    spent = spendings(rows, budgets, pyramid.budget)
    for line in unmet(spent, pyramid, folder, data=None):
        console.note(line)
    if as_json:
        found = {
            "checkpoint": str(folder),
            "benchmarks": [row.to_dict() for row in rows],
            "budgets": [each.to_dict() for each in spent],
        }
        console.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    from dpn_cli.commands.tables import print_benchmarks

    print_benchmarks(rows)
