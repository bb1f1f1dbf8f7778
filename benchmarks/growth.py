"""How do time and memory of a calibration and of an evaluation grow with the samples?

    python benchmarks/growth.py --plot growth.png

Every command is a process of its own, on the demo teacher and its pictures; the memory is the kernel's peak for that
process, the time CPU seconds. Time is linear where every further sample takes as long as the one before it, and memory
flat where it hardly grows: the model and a batch are in memory, and neither pixels nor what the routers read.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from conversion import DPN, run

from dpn_cli import console

CALIBRATE, EVAL = (64, 512, 4096), (700, 7000)


@dataclass(frozen=True)
class Row:
    """What one command took.

    Attributes:
        command: name of the command.
        samples: number of samples.
        cpu_s: CPU seconds.
        peak_mb: peak memory in MB.
    """

    command: str
    samples: int
    cpu_s: float
    peak_mb: float


def measure(calibrate: Sequence[int], evaluate: Sequence[int], work: Path) -> Iterator[Row]:
    """Yield what calibrations and evaluations took, from the smallest on.

    Args:
        calibrate: numbers of samples to calibrate on.
        evaluate: numbers of samples to evaluate on.
        work: an empty folder to work in.
    """
    converted, calibrated = work / "demo-dpn", work / "calibrated"
    run(*DPN, "--quiet", "convert", "demo", "--output", converted)
    commands = [("calibrate", count) for count in sorted(calibrate)] + [("eval", count) for count in sorted(evaluate)]
    for command, count in commands:
        if command == "calibrate" or not calibrated.exists():
            shutil.rmtree(calibrated, ignore_errors=True)
            shutil.copytree(converted, calibrated)
        options = ["--model", calibrated, "--data", "demo", "--samples", str(count), "--json"]
        done = run(*DPN, "--quiet", command, *options)
        yield Row(command, count, done.cpu_seconds, done.peak_bytes / 1e6)


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return a table of rows, with what every sample took that the row before did not have."""
    table = []
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        further = ""
        if before is not None and before.command == row.command:
            further = f"{(row.cpu_s - before.cpu_s) / (row.samples - before.samples) * 1000:.0f}"
        table.append((row.command, str(row.samples), f"{row.cpu_s:.1f}", further, f"{row.peak_mb:.0f}"))
    return table


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw time and memory over the number of samples."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from dpn_cli.evaluation.plots import COLOURS, MARKERS, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        time, memory = figure.subplots(1, 2)
        for command, colour, marker in zip(("calibrate", "eval"), COLOURS, MARKERS, strict=False):
            its = [row for row in rows if row.command == command]
            samples, style = [row.samples for row in its], {"color": colour, "marker": marker, "label": command}
            time.plot(samples, [row.cpu_s for row in its], **style)
            memory.plot(samples, [row.peak_mb for row in its], **style)
        time.set(xscale="log", yscale="log", xlabel="samples", ylabel="CPU seconds")
        memory.set(xscale="log", xlabel="samples", ylabel="peak memory, MB")
        memory.set_ylim(bottom=0)
        memory.legend()
        figure.savefig(path)


@click.command()
@click.option("--calibrate", multiple=True, type=int, default=CALIBRATE, show_default=True, help="Samples; repeatable.")
@click.option("--eval", "evaluate", multiple=True, type=int, default=EVAL, show_default=True, help="Likewise.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curves as a picture, .png or .svg.")
def main(calibrate: tuple[int, ...], evaluate: tuple[int, ...], plot: Path | None) -> None:
    """Run calibrations and evaluations of several sizes, one after another."""
    rows = []
    with TemporaryDirectory() as work:
        for row in measure(calibrate, evaluate, Path(work)):
            rows.append(row)
            console.note(f"{row.command}, {row.samples} samples: {row.cpu_s:.1f} CPU s, {row.peak_mb:.0f} MB")
    columns = ["command", "samples", "CPU s", "ms per further sample", "peak MB"]
    console.table("Growth with the samples, demo teacher", columns, cells(rows))
    if plot is not None:
        draw(plot, rows)


if __name__ == "__main__":
    main()
