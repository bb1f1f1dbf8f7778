"""Public benchmarks through lmms-eval: it is run as a program, once per method, and its results are read. No torch.

Source of the ten tasks: paper, section 4.1; their names are lmms-eval's.
"""

import json
import os
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpn_cli.errors import DpnError, MissingExtraError, UsageError
from dpn_cli.evaluation.spending import Spending
from dpn_cli.parallel import child
from dpn_cli.parallel.launch import without_place

PAPER_TASKS = (
    "vqav2_val", "gqa", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val", "pope", "mme", "mmbench_en_dev", "seedbench",
    "mmvet",
)  # fmt: skip
TEACHER, PYRAMID = "teacher", "dpn"
_TAIL = 20  # lines of a failed run that are shown
_NOT_METRICS = {"alias", "samples", "n", "effective"}


@dataclass(frozen=True)
class Benchmark:
    """One metric of one task.

    Attributes:
        task: the task's name in lmms-eval.
        metric: the metric's name in lmms-eval.
        samples: number of samples that were asked.
        scores: scores by method, the teacher's first, in the metric's own unit.
        fractions: fractions of the prefill FLOPs, by method.
    """

    task: str
    metric: str
    samples: int
    scores: dict[str, float]
    fractions: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Results:
    """What one run of lmms-eval found: metrics by (task, metric), and by task the samples and the FLOPs fractions."""

    metrics: dict[tuple[str, str], float]
    samples: dict[str, int]
    fractions: dict[str, float]


def manifest() -> Any:
    """Tell lmms-eval where the model `dpn` is (entry point of the group `lmms_eval.models`)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="dpn", simple_class_path="dpn_cli.evaluation.lmms_plugin.DpnLlava")


def run_benchmarks(
    checkpoint: Path,
    tasks: Sequence[str],
    budgets: Sequence[float] = (),
    batch_size: int = 8,
    limit: int | None = None,
    include_path: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    dtype: str = "auto",
) -> list[Benchmark]:
    """Let the teacher and the pyramid at every budget answer benchmarks.

    Args:
        checkpoint: a converted or exported folder.
        tasks: names of tasks in lmms-eval.
        budgets: budgets of the pyramid; empty for what the checkpoint is set to.
        batch_size: samples per forward pass.
        limit: samples per task; None for all.
        include_path: a folder with tasks of one's own.
        say: called with every line that lmms-eval prints.
        dtype: dtype to compute in, see `compute_dtype`.

    Raises:
        MissingExtraError: if lmms-eval is not installed.
        UsageError: if lmms-eval could not be told the path.
        DpnError: if a run of it ends without results.
    """
    if find_spec("lmms_eval") is None:
        raise MissingExtraError("a public benchmark (--tasks)", "lmms-eval", "harness")
    if set(",=\"'") & set(str(checkpoint)):
        raise UsageError(f"lmms-eval cannot handle a path with a comma, an equals sign or a quote: rename {checkpoint}")
    settings = {TEACHER: "teacher=True"}
    settings |= {_name(budget): f"budget={budget}" for budget in budgets} or {PYRAMID: ""}
    results = {}
    for name, setting in settings.items():
        say(f"{name}: {', '.join(tasks)}")
        model_args = ",".join(filter(None, [f"pretrained={checkpoint}", f"dtype={dtype}", setting]))
        options = ["--tasks", ",".join(tasks), "--batch_size", str(batch_size)]
        options += [] if limit is None else ["--limit", str(limit)]
        options += [] if include_path is None else ["--include_path", str(include_path)]
        results[name] = _run(model_args, options, say)
    return _side_by_side(results)


def spendings(rows: Sequence[Benchmark], budgets: Sequence[float], own: float | None) -> list[Spending]:
    """Return what the pyramid has spent on every task, which may have several metrics.

    Args:
        rows: Result of `run_benchmarks`.
        budgets: the budgets that it was given.
        own: the budget that the checkpoint is set to, or None.
    """
    asked: dict[str, float | None] = {_name(budget): budget for budget in budgets}
    asked = asked or {PYRAMID: own}
    tasks = {row.task: row for row in rows}.values()
    return [
        Spending(budget, row.fractions[name], row.samples)
        for row in tasks
        for name, budget in asked.items()
        if budget is not None and name in row.fractions
    ]


def _name(budget: float) -> str:
    return f"{PYRAMID} at {budget:g}"


def _side_by_side(results: dict[str, _Results]) -> list[Benchmark]:
    """Return the metrics that all runs have, in the order of the teacher's."""
    return [
        Benchmark(
            task,
            metric,
            samples=results[TEACHER].samples.get(task, 0),
            scores={name: found.metrics[task, metric] for name, found in results.items()},
            fractions={name: found.fractions[task] for name, found in results.items() if task in found.fractions},
        )
        for task, metric in results[TEACHER].metrics
        if all((task, metric) in found.metrics for found in results.values())
    ]


def _run(model_args: str, options: Sequence[str], say: Callable[[str], None]) -> _Results:
    """Run lmms-eval once.

    Raises:
        DpnError: if it leaves no results; its exit status is 0 then, too.
    """
    with TemporaryDirectory(prefix="dpn-lmms-") as folder:
        record = Path(folder, "fractions.json")
        command = child.command(
            "lmms_eval", "eval", "--output_path", folder, *options,
            "--model", "dpn", "--model_args", f"{model_args},record={record}",
        )  # fmt: skip
        tail: deque[str] = deque(maxlen=_TAIL)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=without_place(os.environ)
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    tail.append(line.rstrip())
                    say(line.rstrip())
            except BaseException:
                process.kill()  # it has nothing to keep
                raise
        found = sorted(Path(folder).rglob("*_results.json"))
        if process.returncode or not found:
            raise DpnError("lmms-eval ended without results; its last lines:\n" + "\n".join(tail))
        data = json.loads(found[-1].read_text(encoding="utf-8"))
        fractions = json.loads(record.read_text()) if record.exists() else {}
    return _read(data, fractions)


def _read(data: dict[str, Any], fractions: dict[str, float]) -> _Results:
    """Read the results of lmms-eval: keys are `metric,filter`, and standard errors stand beside them."""
    metrics = {
        (task, key.partition(",")[0]): float(value)
        for task, values in data["results"].items()
        for key, value in values.items()
        if key.partition(",")[0] not in _NOT_METRICS and "_stderr" not in key and _is_number(value)
    }
    samples = {task: int(counts["effective"]) for task, counts in data.get("n-samples", {}).items()}
    return _Results(metrics, samples, fractions)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
