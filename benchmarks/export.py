"""What does an export take? Seconds, gigabytes and peak memory of `dpn export`, and whether what it writes loads.

Run it on a checkpoint of the hub, or on one in the same layout that benchmarks/random_checkpoint.py has written:

    python benchmarks/export.py /tmp/llava-1.5-7b-hf

The source is converted with --link first; then every kind of export is written, loaded in a process of its own, asked
for the logits of a short text, and deleted. Every step is one process, from a cold start: no page of what it reads is
in memory. Peak memory is the kernel's count for that process.
"""

import shutil
import sys
from pathlib import Path

import click
from conversion import DPN, Run, cold, run

KINDS = {
    "as it is, --verify": ("--verify",),
    "bf16": ("--dtype", "bf16"),
    "nf4": ("--quantize", "nf4"),
    "int8": ("--quantize", "int8"),
}
LOAD = """
import sys, torch, dpn_cli
model = dpn_cli.load(sys.argv[1])
with torch.no_grad():
    assert model(input_ids=torch.tensor([[1, 400, 500]])).logits.isfinite().all()
"""


def size(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def row(name: str, done: Run, folder: Path | None = None) -> str:
    """Return a line of the table."""
    written = f"{size(folder) / 1e9:7.2f} GB" if folder else " " * 10
    return f"{name:<24}{done.seconds:8.1f} s{written}{done.peak_bytes / 1e6:9.0f} MB"


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Repeatable; default: all.")
@click.option(
    "--load/--no-load", default=True, show_default=True, help="Load every export, which takes its size in memory."
)
def main(source: Path, kinds: tuple[str, ...], load: bool) -> None:
    """Measure exports of SOURCE, which has to be on a disk with room for it once more."""
    converted, output = (source.with_name(f"{source.name}.benchmark-{what}") for what in ("dpn", "export"))
    click.echo(f"{source.name}, {size(source) / 1e9:.2f} GB: time, size and peak memory")
    try:
        cold(source)
        click.echo(row("convert --link", run(*DPN, "-q", "convert", source, "--link", "-o", converted), converted))
        for kind in kinds or KINDS:
            cold(source)
            done = run(*DPN, "-q", "export", "--model", converted, "-o", output, "--uncalibrated", *KINDS[kind])
            click.echo(row(f"export {kind}", done, output))
            if load:
                cold(output)
                click.echo(row("  loaded, one forward", run(sys.executable, "-P", "-c", LOAD, output)))
            shutil.rmtree(output)
    finally:
        for folder in (converted, output):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
