"""`dpn calibrate`: find the experts that fit a converted checkpoint, and fit its routers."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpn_cli import console, workspace
from dpn_cli.commands.completion import listed
from dpn_cli.commands.data_options import data_options
from dpn_cli.commands.numbers import Fraction
from dpn_cli.commands.options import (
    CALIBRATION_SAMPLES,
    SEED,
    Choice,
    Kinds,
    checkpoint_folder,
    dtype_option,
    model_option,
    processes_option,
    set_option,
    teacher_option,
    together,
    wide_option,
)
from dpn_cli.errors import UsageError
from dpn_cli.extras import extra
from dpn_cli.pyramid.experts import KINDS

if TYPE_CHECKING:
    from dpn_cli.calibration.reporting.report import Report
    from dpn_cli.calibration.settings import Only
    from dpn_cli.data.options import DataOptions


@click.command("calibrate")
@model_option
@data_options
@click.option(
    "--budget",
    type=Fraction(),
    help="Mean fraction of the original's prefill FLOPs to spend; default: the recipe's, or with --budgets-only "
    "and --heal-only the one that the checkpoint is set to.",
)
@click.option("--samples", type=CALIBRATION_SAMPLES, help="Number of calibration samples; default: the recipe's.")
@click.option("--seed", type=SEED, help="Random seed for sampling and fitting; default: the recipe's.")
@click.option(
    "--experts", type=Kinds(), metavar="KIND,KIND,…", shell_complete=listed(lambda: KINDS),
    help=f"Kinds of experts to choose from; default: all in the recipe. Kinds: {', '.join(KINDS)}; pool alone "
    "gives the paper's pyramid.",
)  # fmt: skip
@teacher_option
@click.option(
    "--heal",
    type=Choice(["none", "lora"]),
    help="Train an adapter, too, so that the model needs fewer tokens; default: the recipe's.",
)
@click.option(
    "--load-in", type=Choice(["4bit", "8bit"]), help="Load the frozen model in 4 or 8 bits; default: the recipe's."
)
@dtype_option(None)
@click.option(
    "--budgets-only", is_flag=True,
    help="Keep the routers, and only solve the budgets again, so that they are met on these data.",
)  # fmt: skip
@click.option(
    "--heal-only", is_flag=True,
    help="Heal a calibrated checkpoint: keep its experts, and fit its routers to the healed model.",
)  # fmt: skip
@processes_option
@set_option
@click.option("--restart", is_flag=True, help="Discard what an unfinished calibration has measured, and start over.")
@click.option("-f", "--force", is_flag=True, help="Replace the results of an earlier calibration.")
@wide_option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the report as JSON (the earlier calibration's, if healing does not help).",
)
def command(
    model: Path | None,
    data: "DataOptions",
    budget: float | None,
    samples: int | None,
    seed: int | None,
    experts: str | None,
    teacher: str | None,
    heal: str | None,
    load_in: str | None,
    dtype: str | None,
    budgets_only: bool,
    heal_only: bool,
    overrides: tuple[str, ...],
    restart: bool,
    force: bool,
    wide: bool,
    as_json: bool,
) -> None:
    """Find the experts that fit the model, and fit the routers to it, with forward passes only.

    One calibration serves every budget: `dpn export --budget` and `model.set_budget` choose another one later.
    After a kill or Ctrl-C, run the same command line again to go on, with any number of processes.
    For several machines, run `accelerate launch --no_python dpn calibrate ...` on each.

    A budget is a mean over the calibration data. If your data spend more or less than you ask for, solve the budgets
    again on your data with --budgets-only, which also works on an export. To heal a checkpoint after its calibration,
    use --heal-only, which does not look for experts again.
    """
    from dpn_cli.calibration.settings import (
        budgets_recipe,
        calibration_recipe,
        healing_recipe,
        validate_replaceable,
    )
    from dpn_cli.checkpoint.layout import open_converted

    only: Only | None = "budgets" if budgets_only else "heal" if heal_only else None
    options = {"budget": budget, "samples": samples, "seed": seed, "load_in": load_in, "dtype": dtype}
    overrides = (*overrides, f"calibration.heal.method={heal}") if heal and not budgets_only else overrides
    overrides = (*overrides, f"calibration.survey.experts=[{experts}]") if experts else overrides
    with together():
        if budgets_only and heal_only:
            raise UsageError("--budgets-only trains nothing, --heal-only does: leave one out")
        if budgets_only and heal not in (None, "none"):
            raise UsageError("--budgets-only trains nothing: leave out --heal")
        if only and experts:
            raise UsageError(f"--{only}-only keeps the routes that are offered: leave out --experts")
        folder = checkpoint_folder(model)
        recipes = {"budgets": budgets_recipe, "heal": healing_recipe, None: calibration_recipe}
        recipe = recipes[only](folder, overrides, {k: v for k, v in options.items() if v is not None})
        validate_replaceable(folder, force, restart, only)
        earlier = open_converted(folder)[2].calibrated_on

    with console.waiting("starting"):
        from dpn_cli.calibration.calibrate import calibrate
        from dpn_cli.calibration.store import REPORT_FILE

    try:
        report = calibrate(folder, data, recipe, console.REPORTER, teacher=teacher, restart=restart, only=only)
    except KeyboardInterrupt:
        console.note("Nothing that was measured is lost: run the same command line again to go on.")
        raise
    if report is None:
        if as_json:
            console.echo((folder / REPORT_FILE).read_text(encoding="utf-8"))
        return
    try:
        with extra(f"{workspace.FOLDER} cannot be written here, so pass  --model {folder}"):
            workspace.remember(folder)
    finally:
        _show(report, wide, as_json)
    if not as_json:
        what = "λ, the budget table" if budgets_only else "the routers"
        replaced = f", in place of those of the calibration {earlier}" if earlier else ""
        replaced += "; calibration/earlier keeps those and its config.json" if budgets_only else ""
        console.note(
            f"Wrote {what} and calibration/report.html to {folder}{replaced}. "
            f"Next: dpn {'eval' if budgets_only else 'export'}"
        )


def _show(report: "Report", wide: bool, as_json: bool) -> None:
    from dpn_cli.commands.tables.calibration import print_calibration

    if as_json:
        console.print_json(report.to_dict())
    else:
        print_calibration(report, wide)
