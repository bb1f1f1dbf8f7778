"""How much slower than a copy is a conversion? `dpn convert` against `cp -r` and sync, on one disk, in one run.

Run it on a checkpoint of the hub, or on one in the same layout that benchmarks/random_checkpoint.py has written:

    python benchmarks/conversion.py /tmp/llava-1.5-7b-hf --rounds 4

Every round copies and converts once, in turns first and second. Both write a sibling of the source, start with no page
of the source in memory and no dirty page of this program's on the way to the disk, and end when all that they wrote is
on it: `cp -r SOURCE COPY && sync COPY COPY/*` (every file and the folder; not the whole machine's dirty pages, which
could be anybody's) against the whole process `dpn convert SOURCE`, Python's start, the checks before and the check
after included. The ratio is taken within each round. `dpn convert --link` and `dpn inspect` are timed after. Peak
memory is the kernel's count for the process. What was written is deleted at once, so the disk has to hold the source
twice.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

DPN = (sys.executable, "-P", "-m", "dpn_cli")


@dataclass(frozen=True)
class Run:
    """A process that ended well: seconds on the clock and of the CPU, and its peak memory in bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(*args: str | Path) -> Run:
    """Run a process to its end.

    Raises:
        ClickException: if it fails.
    """
    start = time.perf_counter()
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(map(str, args))} ended with {process.returncode}: {said}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Run(time.perf_counter() - start, cpu_seconds, usage.ru_maxrss * 1024)


def cold(source: Path) -> None:
    """Take the pages of a folder's files out of memory, after all earlier writing is done."""
    os.sync()
    for path in source.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> Run:
    """Copy a folder, and wait until it is on the disk."""
    return run("sh", "-c", 'cp -r "$0" "$1" && sync "$1" "$1"/*', source, target)


def convert(source: Path, target: Path) -> Run:
    """Convert a folder, in a process of its own."""
    return run(*DPN, "--quiet", "convert", source, "--output", target)


def link(source: Path, target: Path) -> Run:
    """Convert a folder without copying its shards."""
    return run(*DPN, "--quiet", "convert", source, "--output", target, "--link")


def measure(source: Path, target: Path, write: Callable[[Path, Path], Run]) -> Run:
    """Measure one way to write `target` from a cold start, and delete it."""
    cold(source)
    try:
        return write(source, target)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def beside(source: Path) -> Path:
    """Return where to write."""
    return source.with_name(f"{source.name}.benchmark")


def paired(source: Path, rounds: int) -> tuple[list[Run], list[Run]]:
    """Copy and convert in turns; return the runs of each."""
    copies: list[Run] = []
    conversions: list[Run] = []
    ways = [(copy, copies), (convert, conversions)]
    for i in range(rounds):
        for write, found in ways[:: -1 if i % 2 else 1]:
            found.append(measure(source, beside(source), write))
        ratio = conversions[-1].seconds / copies[-1].seconds
        click.echo(f"round {i + 1}: {copies[-1].seconds:.1f} s, {conversions[-1].seconds:.1f} s, {ratio:.3f}", err=True)
    return copies, conversions


def seconds(runs: Sequence[Run]) -> str:
    """Return the median and the range."""
    times = [each.seconds for each in runs]
    return f"{statistics.median(times):.2f} s ({min(times):.2f}…{max(times):.2f})"


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rounds", type=click.IntRange(min=1), default=4, show_default=True)
def main(source: Path, rounds: int) -> None:
    """Measure conversions of SOURCE."""
    copies, conversions = paired(source, rounds)
    ratios = [conversion.seconds / copied.seconds for copied, conversion in zip(copies, conversions, strict=True)]
    links = [measure(source, beside(source), link) for _ in range(rounds)]
    inspections = [run(*DPN, "inspect", source, "--json") for _ in range(5)]
    size = sum(path.stat().st_size for path in source.iterdir())
    click.echo(f"{source.name}, {size / 1e9:.2f} GB, {rounds} rounds: median (range)")
    click.echo(f"cp -r and sync    {seconds(copies)}")
    click.echo(f"dpn convert       {seconds(conversions)}, peak {max(r.peak_bytes for r in conversions) / 1e6:.0f} MB")
    click.echo(f"convert / copy    {statistics.median(ratios):.3f} ({min(ratios):.3f}…{max(ratios):.3f})")
    click.echo(f"convert --link    {seconds(links)}")
    click.echo(f"dpn inspect       {seconds(inspections)}")


if __name__ == "__main__":
    main()
