"""`dpn data`: what was read, how it will be asked, and what a calibration on it will cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.filesize import decimal

from dpn_cli import console
from dpn_cli.commands.data_options import bad_row_options, reading_options, takes_data
from dpn_cli.commands.options import CALIBRATION_SAMPLES, SEED, model_option, teacher_option
from dpn_cli.data.formats import describe_formats
from dpn_cli.errors import UsageError
from dpn_cli.reporter import Reporter

if TYPE_CHECKING:
    from dpn_cli.calibration.forecast import Forecast
    from dpn_cli.calibration.preview import Preview
    from dpn_cli.data.options import DataOptions


@click.command(
    "data",
    help=f"""Show how DATA are read and asked, and what a calibration on them will cost.

    DATA is one of these: {describe_formats()}.

    Rows are drawn and checked as `dpn calibrate` does. With a current checkpoint, or --model, samples are shown in its
    chat template, and time, memory and disk space are estimated. No model is loaded.""",
)
@click.argument("data", metavar="DATA")
@model_option
@reading_options
@bad_row_options
@teacher_option
@click.option("--samples", type=CALIBRATION_SAMPLES, help="Number of samples to draw; default: the recipe's.")
@click.option("--seed", type=SEED, help="Random seed for sampling; default: the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@takes_data
def command(
    model: Path | None,
    data: "DataOptions",
    teacher: str | None,
    samples: int | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Show what is read of some data."""
    from dpn_cli.calibration.settings import budgets_recipe, calibration_recipe, has_recipe
    from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe

    folder = _checkpoint(model)
    if folder is None and teacher is not None:
        raise UsageError("--teacher needs a checkpoint that is to be calibrated: `dpn convert MODEL` first")
    given: dict[str, Any] = {name: value for name, value in (("samples", samples), ("seed", seed)) if value is not None}
    recipe = CalibrationRecipe(**given)
    if folder is not None:
        recipe = (calibration_recipe if has_recipe(folder) else budgets_recipe)(folder, (), given)
    with console.waiting("starting"):
        from dpn_cli.calibration.job import MIN_SAMPLES
        from dpn_cli.calibration.preview import preview
    found = preview(data, folder, recipe, Reporter(progress=console.progress, waiting=console.waiting), teacher)
    if as_json:
        result = {"data": data.name, "checkpoint": folder and str(folder), **found.to_dict()}
        console.print_json(result)
        return
    _show(found)
    if folder is None:
        console.note("There is no checkpoint here. To see what a calibration will cost, run `dpn convert MODEL` first.")
    elif not has_recipe(folder):
        console.note(
            f"{folder} is an export, or its pyramid was trained with the model, so no calibration is estimated. "
            "To estimate one, pass --model with a folder that `dpn convert` wrote."
        )
    elif found.forecast is None:
        console.note(f"A calibration needs {MIN_SAMPLES} samples with an image or more, so none is estimated.")


def _checkpoint(model: Path | None) -> Path | None:
    """Return the checkpoint that is given or current; None where there is none yet."""
    from dpn_cli import workspace
    from dpn_cli.commands.options import checkpoint_folder

    return checkpoint_folder(model) if model is not None or workspace.STATE_FILE.is_file() else None


def _show(found: "Preview") -> None:
    console.paragraph("\n".join(found.scan.lines()))
    if found.columns:
        rows = [(name, role or "not read") for name, role in found.columns.items()]
        console.table("Columns", ["column", "read as"], rows, texts=["column", "read as"])
    console.echo("")
    for asked in found.asked:
        console.echo(f"Row {asked.row}, as it is asked:" if asked.row else "A sample, as it is asked:")
        for name, height, width in asked.images:
            console.echo(f"  image: {name}, {width}×{height} pixels")
        console.paragraph("\n".join(f"  | {line}" for line in asked.prompt.splitlines()))
        console.paragraph(
            f"  answer: {asked.answer}\n" if asked.answer is not None else "  answer: the teacher's own\n"
        )
    if found.forecast:
        _show_forecast(found.forecast)


def _show_forecast(cost: "Forecast") -> None:
    console.table(
        "A calibration on these data, estimated",
        ["time", "memory", "disk"],
        [(_duration(cost.seconds), decimal(cost.memory_bytes), decimal(cost.disk_bytes))],
        legend=" ".join(cost.basis),
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
