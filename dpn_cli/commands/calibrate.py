"""`dpn calibrate`: fit the routers of a converted checkpoint."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpn_cli import console
from dpn_cli.commands.options import (
    Choice,
    Fraction,
    checkpoint_folder,
    data_options,
    model_option,
    processes_option,
    together,
)

if TYPE_CHECKING:
    from dpn_cli.calibration.data import OnBadRow


@click.command("calibrate")
@model_option
@data_options
@click.option(
    "--budget",
    type=Fraction(),
    help="Mean fraction of the original's prefill FLOPs to spend; default: the recipe's.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Calibration samples to use; default: the recipe's.")
@click.option("--seed", type=click.IntRange(min=0), help="Of sampling and fitting; default: the recipe's.")
@click.option(
    "--heal", type=Choice(["none", "lora"]), help="Train an adapter for pooled tokens first; default: the recipe's."
)
@click.option(
    "--load-in", type=Choice(["4bit", "8bit"]), help="Hold the frozen model quantised; default: the recipe's."
)
@processes_option
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one recipe value; repeatable.")
@click.option("--restart", is_flag=True, help="Drop what an unfinished calibration has measured and begin anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: Path | None,
    data: str,
    image_root: Path | None,
    on_bad_row: "OnBadRow",
    max_bad: float,
    budget: float | None,
    samples: int | None,
    seed: int | None,
    heal: str | None,
    load_in: str | None,
    overrides: tuple[str, ...],
    restart: bool,
    as_json: bool,
) -> None:
    """Fit the routers to the model itself, with forward passes only.

    One calibration serves every budget: `dpn export --budget` and `model.set_budget` choose another one later.
    After a kill or Ctrl-C, the same command line goes on where it stopped, with any number of processes.
    For several machines: `accelerate launch -m dpn_cli calibrate ...` on each.
    """
    from dpn_cli.calibration.settings import calibration_recipe

    options = {"budget": budget, "samples": samples, "seed": seed, "load_in": load_in}
    overrides = (*overrides, f"calibration.heal.method={heal}") if heal else overrides
    with together():
        folder = checkpoint_folder(model)
        recipe = calibration_recipe(folder, overrides, {k: v for k, v in options.items() if v is not None})

    from dpn_cli.calibration.calibrate import calibrate

    try:
        report = calibrate(
            folder, data, recipe, image_root, console.progress, console.note, restart, on_bad_row, max_bad
        )
    except KeyboardInterrupt:
        console.note("What was measured is kept: the same command line goes on from there.")
        raise
    if report is None:
        return
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        return
    from dpn_cli.commands.tables import print_calibration

    print_calibration(report)
    console.note(f"Wrote the routers and calibration/report.html to {folder}. Next: dpn export")
