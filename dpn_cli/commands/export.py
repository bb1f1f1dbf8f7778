"""`dpn export`: one compact folder that stock transformers loads."""

import json
from pathlib import Path

import click

from dpn_cli import console
from dpn_cli.commands.options import Choice, Fraction, checkpoint_folder, model_option


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
    help="Convert the tensors, the routers' excepted; default: leave them as they are.",
)  # fmt: skip
@click.option(
    "--max-shard-size", default="2GB", show_default=True, metavar="SIZE", help="Of one file, such as 500MB or 2GB."
)
@click.option("-f", "--force", is_flag=True, help="Replace an output that dpn wrote before.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: Path | None,
    output: Path | None,
    budget: float | None,
    dtype: str | None,
    max_shard_size: str,
    force: bool,
    as_json: bool,
) -> None:
    """Write one compact folder of safetensors with its code: it loads with dpn-cli installed or without."""
    from dpn_cli.export import export

    folder = checkpoint_folder(model)
    if output is None:
        output = Path(f"{folder.resolve().name.removesuffix('-dpn')}-dpn-export")
    done = export(folder, output, dtype, max_shard_size, budget, force)
    if as_json:
        report = {
            "checkpoint": str(done.source),
            "output": str(done.output),
            "bytes": done.nbytes,
            "tensors": done.num_tensors,
            "files": done.files,
            "dtype": done.dtype,
            "budget": budget,
            "lambda": done.pyramid.trade_off,
        }
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    asked = f"budget {budget:g}, " if budget else "" if done.pyramid.budgets else "not calibrated, "
    console.table(
        f"{folder} → {output}",
        ["tensors", "MB", "files", "dtype", "route"],
        [(done.num_tensors, f"{done.nbytes / 1e6:,.1f}", len(done.files), done.dtype or "unchanged",
          f"{asked}λ {done.pyramid.trade_off:.4g}")],
    )  # fmt: skip
    console.note(f"Wrote {output}. Load it with  dpn_cli.load({str(output)!r}),  or where dpn is not installed with")
    console.note(f"AutoModelForImageTextToText.from_pretrained({str(output)!r}, dtype='auto', trust_remote_code=True)")
