"""`dpn export`: one compact folder that stock transformers loads."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from dpn_cli import console
from dpn_cli.commands.numbers import Fraction
from dpn_cli.commands.options import Choice, checkpoint_folder, model_option
from dpn_cli.commands.replaced import in_place_of
from dpn_cli.errors import UsageError
from dpn_cli.exporting.options import DEFAULT_SHARD_SIZE, ExportOptions
from dpn_cli.pyramid.presets import PRESET_KEY, PRESETS

if TYPE_CHECKING:
    from dpn_cli.exporting.export import Export
    from dpn_cli.exporting.quantise import Scheme


@click.command("export")
@model_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The folder to write; default: ./NAME-dpn-export."
)
@click.option(
    "--budget", type=Fraction(), help="Mean fraction of the original's prefill FLOPs to spend; default: as calibrated."
)
@click.option(
    "--dtype", type=Choice(["bf16", "fp16", "fp32"]),
    help="Dtype to convert all tensors to, except the routers'; default: leave them as they are.",
)  # fmt: skip
@click.option(
    "--max-shard-size",
    default=DEFAULT_SHARD_SIZE,
    show_default=True,
    metavar="SIZE",
    help="Maximum size of one file, such as 500MB or 2GB.",
)
@click.option(
    "--quantize", type=Choice(["int8", "nf4"]),
    help="Store the decoder's linear layers in 8 or 4 bits (bitsandbytes); default: as they are.",
)  # fmt: skip
@click.option(
    "--static", "--route", "static", metavar="ROUTE",
    help="One fixed route for every image, without routers (unless their gate scales tokens): either one expert per "
    "site, such as keep,keep,2x2,keep,exit, or a published method and the share of tokens that it keeps, such as "
    f"pyramiddrop:0.5 or, as its authors write it, fastv:K=3,R=0.5. Methods: {', '.join(PRESETS)}.",
)  # fmt: skip
@click.option(
    "--uncalibrated", is_flag=True,
    help="Export even if the routers are not calibrated; such a model keeps all tokens and answers as the original.",
)  # fmt: skip
@click.option(
    "--drop-unused", is_flag=True,
    help="Leave out the vision layers after the last one that is used; outputs stay the same.",
)  # fmt: skip
@click.option(
    "--check-values/--no-check-values", default=True, show_default=True,
    help="Stop at NaN and infinite values.",
)  # fmt: skip
@click.option(
    "--verify", is_flag=True,
    help="Read unchanged tensors back from the disk and compare them with the checkpoint's.",
)  # fmt: skip
@click.option(
    "--push", metavar="REPO", help="Upload the finished folder to this model repository on the Hugging Face hub."
)
@click.option("--private", is_flag=True, help="Make the repository private if it does not exist yet.")
@click.option("-f", "--force", is_flag=True, help="Replace an output folder that dpn wrote earlier.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(
    model: Path | None,
    output: Path | None,
    budget: float | None,
    dtype: str | None,
    max_shard_size: str,
    quantize: str | None,
    static: str | None,
    uncalibrated: bool,
    drop_unused: bool,
    check_values: bool,
    verify: bool,
    push: str | None,
    private: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write one compact folder of safetensors that loads with dpn-cli installed or without it."""
    from dpn_cli.checkpoint.source import resolve_source
    from dpn_cli.exporting import hub
    from dpn_cli.exporting.export import export

    if private and not push:
        raise UsageError("--private makes the repository of --push private: give --push too")
    if push:
        hub.check_push(push)
    folder = checkpoint_folder(model)
    if output is None:
        output = Path(f"{resolve_source(str(folder)).name.removesuffix('-dpn')}-dpn-export")
    options = ExportOptions(
        dtype=dtype, max_shard_size=max_shard_size, budget=budget, quantize=cast("Scheme | None", quantize),
        static=static, drop_unused=drop_unused, check_values=check_values, verify=verify, uncalibrated=uncalibrated,
    )  # fmt: skip
    replaced = in_place_of(output)
    with console.waiting("exporting"):
        done = export(folder, output, options, force, console.REPORTER)
    for note in done.notes:
        console.note(note)
    url = None
    try:
        url = hub.push(output, push, private) if push else None
    except KeyboardInterrupt:
        again = hub.upload_command(output, str(push), private)
        console.note(f"{output} is complete, but not uploaded. To upload it, run  {again}")
        raise
    finally:
        if as_json:
            _print_json(done, budget, url)
        else:
            _show(done, budget)
    if as_json:
        return
    if done.num_verified is not None:
        console.note(f"{done.num_verified} tensors equal the checkpoint's, byte for byte.")
    if url:
        console.note(f"Uploaded to {url}.")
    console.note(
        f"Wrote {output}{replaced}. Load it with  dpn_cli.load({str(output)!r}),  or where dpn is not installed with"
    )
    console.note(f"AutoModelForImageTextToText.from_pretrained({str(output)!r}, dtype='auto', trust_remote_code=True)")


def _print_json(done: "Export", budget: float | None, url: str | None) -> None:
    report = {
        "checkpoint": str(done.source),
        "output": str(done.output),
        "bytes": done.nbytes,
        "tensors": done.num_tensors,
        "files": done.files,
        "dtype": done.dtype,
        "quantization": done.scheme,
        "budget": budget,
        "lambda": done.pyramid.trade_off,
        "static_route": done.pyramid.static_route,
        "preset": done.pyramid.calibration.get(PRESET_KEY),
        "verified_tensors": done.num_verified,
        "url": url,
    }
    console.print_json(report)


def _show(done: "Export", budget: float | None) -> None:
    from dpn_cli.checkpoint.source import resolve_source
    from dpn_cli.pyramid.route import format_route

    pyramid = done.pyramid
    if pyramid.static_route is not None:
        preset = pyramid.calibration.get(PRESET_KEY)
        route = f"fixed, {preset or format_route(pyramid.static_route, pyramid.sites)}"
    else:
        known = pyramid.budgets or pyramid.is_imported
        asked = f"budget {budget:g}, " if budget else "" if known else "not calibrated, "
        route = f"the routers', {asked}λ {pyramid.trade_off:.4g}"
    kind = " + ".join(filter(None, (done.dtype, done.scheme))) or "unchanged"
    console.table(
        f"{resolve_source(str(done.source)).label} → {done.output}",
        ["tensors", "MB", "files", "dtype", "route"],
        [(done.num_tensors, f"{done.nbytes / 1e6:,.1f}", len(done.files), kind, route)],
    )
