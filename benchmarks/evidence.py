"""The README's figures and pictures from scratch, in one run; `conversion.py` and GPUs' latencies stand apart.

    make evidence
    python benchmarks/evidence.py --small --output somewhere

The first takes hours on two cores and writes `evidence/`, with its checkpoints in `work/` there; `docs/evidence/` has
what such runs have shown. The second runs the same steps on a handful of samples, for figures that mean nothing. A step
is one command. What it prints goes into a file of its own, below the command, the date, the machine and the versions; a
step whose file is there is not run again, so that a stopped run goes on.
"""

import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click

from dpn_cli import console
from dpn_cli.errors import DpnError

HERE = Path(__file__).parent
LAST_LINES = 5  # of stderr
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Step:
    """One command whose output is evidence.

    Attributes:
        name: Name of the output file, without its suffix.
        command: What is run in the output folder: `dpn`, a benchmark, or `python -m` with a module of this repository,
            and its arguments.
        small: Arguments added with `--small`.
        copied: A folder that is copied first, and the name of its copy.
    """

    name: str
    command: str
    small: str = ""
    copied: tuple[str, str] | None = None

    def words(self, is_small: bool) -> list[str]:
        """Return the command line as one would type it."""
        return shlex.split(f"{self.command} {self.small if is_small else ''}")

    def arguments(self, is_small: bool) -> list[str]:
        """Return the command line for this interpreter."""
        program, *arguments = self.words(is_small)
        runner = {"dpn": ["-m", "dpn_cli"], "python": []}.get(program, [str(HERE / program)])
        return [sys.executable, *runner, *arguments]


DEMO, SECOND = "work/routed", "work/second"
BATCHES = "--set calibration.batch_size=32"
CHOSEN = (
    f"{BATCHES} --budget 0.25 --set calibration.survey.samples=48 --set calibration.survey.routes=64 "
    "--set calibration.survey.width=20"
)
FITTED = "--num-processes 2 --set calibration.holdout=0.07 --set calibration.epochs=80"
ON_DEMO, ON_SECOND = f"--data demo --samples 8192 {FITTED}", f"--data work/second-samples --samples 4096 {FITTED}"
WATCHED = "--set calibration.predictors.samples=24576 --set calibration.predictors.epochs=6"  # generators are endless
SHORT = "--samples 32 --set calibration.predictors.samples=64"
HEAL = (
    f"{BATCHES} --heal-only --force --budget 0.2 --set calibration.heal.steps=300 "
    "--set calibration.heal.gradient_accumulation=4 --set calibration.heal.learning_rate=5e-4 "
    "--set calibration.heal.samples=24576"
)
SHORT_HEAL = "--samples 32 --set calibration.heal.steps=2 --set calibration.heal.samples=64"
SECOND_TEACHER = HERE / "second_teacher"
STEPS = (
    Step("demo", "dpn demo --output work/demo", "--samples 32 --questions 32"),
    Step("convert", f"dpn convert demo --output {DEMO}"),
    Step(
        "calibrate",
        f"dpn calibrate --model {DEMO} {ON_DEMO} {CHOSEN} {WATCHED}",
        SHORT,
    ),
    Step("calibration", f"calibration.py --model {DEMO} --samples 600", "--samples 16 --budget 0.25"),
    Step(
        "frontier",
        f"frontier.py --model {DEMO} --samples 700 --max-new-tokens 12 --json frontier.json --plot frontier.png",
        "--samples 16 --budget 0.25",
    ),
    Step(
        "calibrate-healed",
        f"dpn calibrate --model work/healed {ON_DEMO} {HEAL}",
        SHORT_HEAL,
        (DEMO, "work/healed"),
    ),
    Step("healing", f"healing.py --plain {DEMO} --healed work/healed --samples 700", "--samples 16 --budget 0.25"),
    Step(
        "frontier-healed",
        f"frontier.py --model {DEMO} --healed work/healed --samples 700 --max-new-tokens 12",
        "--samples 16 --budget 0.25",
    ),
    Step(
        "second-samples",
        "python -m tools.second_teacher.data --output work/second-samples --samples 36864",
        "--samples 32",
    ),
    Step(
        "second-heldout",
        "python -m tools.second_teacher.data --output work/second-heldout --split heldout --samples 700",
        "--samples 32",
    ),
    Step("second-convert", f"dpn convert work/{SECOND_TEACHER.name} --recipe demo --output {SECOND}"),
    Step(
        "second-calibrate",
        f"dpn calibrate --model {SECOND} {ON_SECOND} {CHOSEN} "
        "--set calibration.predictors.samples=4096 --set calibration.predictors.epochs=12",
        SHORT,
    ),
    Step(
        "second-calibration",
        f"calibration.py --model {SECOND} --data work/second-heldout --samples 700",
        "--samples 16 --budget 0.36",
    ),
    Step(
        "second-frontier",
        f"frontier.py --model {SECOND} --data work/second-heldout --samples 700 --max-new-tokens 12 "
        "--json second-frontier.json --plot second-frontier.png",
        "--samples 16 --budget 0.36",
    ),
    Step(
        "second-calibrate-healed",
        f"dpn calibrate --model {SECOND}-healed {ON_SECOND} {HEAL}",
        SHORT_HEAL,
        (SECOND, f"{SECOND}-healed"),
    ),
    Step(
        "second-healing",
        f"healing.py --plain {SECOND} --healed {SECOND}-healed --data work/second-heldout --samples 700",
        "--samples 16 --budget 0.36",
    ),
    Step("measuring", f"measuring.py --model {DEMO} --samples 1536", "--samples 32 --held-out 16"),
    Step("growth", "growth.py --plot growth.png", "--calibrate 32 --eval 16"),
    Step("threads", "threads.py", "--samples 32"),
    Step("terminal-80x24", "recording.py --columns 80 --rows 24", "--small"),
    Step("terminal-100x30", "recording.py --columns 100 --rows 30", "--small"),
    Step("rollout", f"rollout.py --model {DEMO}", "--samples 16 --rounds 1"),
    Step(
        "latency",
        "latency.py --shared --json latency.json --plot latency.png",
        "--case 576 --rounds 1 --budget 0.25 --against divprune",
    ),
)


def header(step: Step, is_small: bool, seconds: float, cpu_seconds: float) -> str:
    """Say what was run, when, where and with what."""
    copy = f"cp -r {shlex.join(step.copied)}; " if step.copied else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("dpn-cli", *PACKAGES))
    return "\n".join(
        [
            f"command: {copy}{shlex.join(step.words(is_small))}",
            f"date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; wall time {seconds:.0f} s, CPU time {cpu_seconds:.0f} s",
            f"machine: {platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python "
            f"{platform.python_version()}",
            f"versions: {packages}",
            "seeds: those of the recipes, 0",
        ]
    )


def run(step: Step, output: Path, is_small: bool) -> None:
    """Run a step and keep what it prints; on failure nothing is kept.

    Raises:
        DpnError: if it fails; the last lines that it wrote are in the message.
    """
    if step.copied:
        source, copy = (output / name for name in step.copied)
        shutil.copytree(source, copy, dirs_exist_ok=True)
    start, cpu_start = time.perf_counter(), children_seconds()
    ended = subprocess.run(
        step.arguments(is_small), cwd=output, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
    if ended.returncode:
        last = "\n".join(ended.stderr.strip().splitlines()[-LAST_LINES:])
        raise DpnError(f"step {step.name} ended with exit code {ended.returncode}: {last}")
    text = header(step, is_small, time.perf_counter() - start, children_seconds() - cpu_start)
    said = ended.stdout or "\n".join(ended.stderr.splitlines()[-LAST_LINES:])  # a calibration that changes nothing
    (output / f"{step.name}.txt").write_text(f"{text}\n\n{said}", encoding="utf-8")


def children_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("evidence"), show_default=True)
@click.option("--only", multiple=True, type=click.Choice([step.name for step in STEPS]), help="Repeatable.")
@click.option("--small", is_flag=True, help="A handful of samples: to see that every step runs.")
def main(output: Path, only: tuple[str, ...], small: bool) -> None:
    """Run every step whose file is missing."""
    shutil.copytree(SECOND_TEACHER, output / "work" / SECOND_TEACHER.name, dirs_exist_ok=True)
    for step in STEPS:
        if (only and step.name not in only) or (output / f"{step.name}.txt").exists():
            continue
        console.note(f"{step.name}: {step.command}")
        run(step, output, small)
    console.note(f"All steps are in {output}.")


if __name__ == "__main__":
    main()
