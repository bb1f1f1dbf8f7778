"""`dpn eval`: what the pyramid lost and gained, and whether another method would have been better."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpn_cli import console
from dpn_cli.commands.options import Choice, Fraction, checkpoint_folder, data_options, model_option, processes_option
from dpn_cli.errors import UsageError, did_you_mean
from dpn_cli.evaluation.contenders import CONTENDERS

if TYPE_CHECKING:
    from dpn_cli.calibration.data import OnBadRow


@click.command("eval")
@model_option
@data_options
@click.option(
    "--budget", "budgets", type=Fraction(), multiple=True,
    help="Mean fraction of the original's prefill FLOPs to spend; repeatable; default: what the checkpoint is set to.",
)  # fmt: skip
@click.option(
    "--against", metavar="NAME,NAME,…", default="",
    help=f"Let other methods answer for the same FLOPs: {', '.join(CONTENDERS)}, or all.",
)  # fmt: skip
@click.option(
    "--metric", type=Choice(["exact", "choice", "anls"]), default="exact", show_default=True,
    help="How answers are scored by labels: normalised exact match (VQA), letter of the option, or edit distance.",
)  # fmt: skip
@click.option("--by", "kind_field", default="kind", show_default=True, help="The data's field to group figures by.")
@click.option("--samples", type=click.IntRange(min=1), help="Samples to draw; default: all, of the demo 512.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draw.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Per answer.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Samples per forward pass.")
@processes_option
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Draw KL over FLOPs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: Path | None,
    data: str,
    image_root: Path | None,
    on_bad_row: "OnBadRow",
    max_bad: float,
    budgets: tuple[float, ...],
    against: str,
    metric: str,
    kind_field: str,
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
    """
    names = _names(against)
    folder = checkpoint_folder(model)
    from dpn_cli.evaluation.pictures import plot_evaluation
    from dpn_cli.evaluation.plots import check_plot
    from dpn_cli.evaluation.run import evaluate_folder

    if plot is not None:
        check_plot(plot)
    try:
        result = evaluate_folder(
            folder, data, image_root, on_bad_row, max_bad,
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
        click.echo(
            json.dumps({"checkpoint": str(folder), "data": data} | result.to_dict(), indent=2, ensure_ascii=False)
        )
        return
    from dpn_cli.commands.tables import print_evaluation

    print_evaluation(result)


def _names(against: str) -> tuple[str, ...]:
    """Read the names of contenders.

    Raises:
        UsageError: for one that is unknown.
    """
    names = [name.strip() for name in against.split(",") if name.strip()]
    for name in names:
        if name not in (*CONTENDERS, "all"):
            known = ", ".join((*CONTENDERS, "all"))
            raise UsageError(f"--against {name!r} is not one of {known}.{did_you_mean(name, CONTENDERS)}")
    return CONTENDERS if "all" in names else tuple(dict.fromkeys(names))
