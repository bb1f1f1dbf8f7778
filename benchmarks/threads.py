"""What does it cost to share the machine? CPU seconds of every step, quiet and with all cores kept busy by others.

    python benchmarks/threads.py

A calibration and an evaluation of the demo teacher run twice in a process of their own each, once beside as many
processes that only count as there are cores. No step should take more than 1.5 times the CPU seconds; steps of less
than a second say little. `OMP_WAIT_POLICY=ACTIVE python benchmarks/threads.py` shows threads that spin while they wait.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from dpn_cli import console
from dpn_cli.cli import set_up_libraries

LIMIT = 1.5
_SPAWN = get_context("spawn")


def steps(samples: int) -> dict[str, float]:
    """Calibrate and evaluate; return the CPU seconds of every step that reports its progress, and of all."""
    set_up_libraries()
    from dpn_cli.calibration.calibrate import calibrate
    from dpn_cli.calibration.settings import calibration_recipe
    from dpn_cli.conversion.convert import convert
    from dpn_cli.data.options import DataOptions
    from dpn_cli.evaluation.options import EvaluationOptions
    from dpn_cli.evaluation.run import evaluate_folder
    from dpn_cli.reporter import Reporter

    spent: dict[str, float] = {}

    @contextmanager
    def timed(title: str, total: int) -> Iterator[Callable[[int], None]]:
        start = time.process_time()
        yield lambda done: None
        spent[title] = spent.get(title, 0.0) + time.process_time() - start

    with TemporaryDirectory() as work:
        os.chdir(work)
        folder, data, reporter = Path("demo-dpn"), DataOptions("demo"), Reporter(progress=timed)
        with timed("all", 1):
            convert("demo", output=folder)
            calibrate(folder, data, calibration_recipe(folder, (), {"samples": samples}), reporter)
            evaluate_folder(folder, data, EvaluationOptions(samples=samples), reporter)
    return spent


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep cores busy with processes that only count."""
    others = [_SPAWN.Process(target=_count, daemon=True) for _ in range(processes)]
    for each in others:
        each.start()
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.join()


def _count() -> None:
    while True:
        sum(range(1_000_000))


def alone(samples: int) -> dict[str, float]:
    """Take the steps in a process of their own."""
    with ProcessPoolExecutor(1, mp_context=_SPAWN) as pool:
        return pool.submit(steps, samples).result()


@click.command()
@click.option("--samples", default=64, show_default=True, help="Samples to calibrate on, and as many to evaluate on.")
def main(samples: int) -> None:
    """Take all steps on a quiet machine, then on a busy one."""
    cores = len(os.sched_getaffinity(0))
    quiet = alone(samples)
    with busy(cores):
        crowded = alone(samples)
    rows = [
        (step, f"{seconds:.1f}", f"{crowded[step]:.1f}", f"{crowded[step] / max(seconds, 1e-9):.2f}")
        for step, seconds in quiet.items()
    ]
    console.table(f"CPU seconds on {cores} cores", ["step", "quiet", "busy", f"ratio (≤ {LIMIT})"], rows)


if __name__ == "__main__":
    main()
