"""The tables that more than one command prints."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpn_cli import console

if TYPE_CHECKING:
    from dpn_cli.calibration.policy import Outcome
    from dpn_cli.calibration.reporting.report import Report
    from dpn_cli.evaluation.evaluate import Evaluation, Result
    from dpn_cli.evaluation.figures import Figures
    from dpn_cli.evaluation.harness import Benchmark
    from dpn_cli.evaluation.latency import Latency, Measurement
    from dpn_cli.pyramid.config import Route

PHASE_NAMES = {
    "vision": "vision tower",
    "prefill": "prefill",
    "first_token": "first token",
    "decode": "decode, per token",
}
BUDGETS_SHOWN = 10
ROUTES_PER_KIND = 2


def print_calibration(report: "Report") -> None:
    """Print what a calibration reached on its held-out samples: any budget, the chosen one and fixed routes' best."""

    def row(name: str, outcome: "Outcome", trade_off: float | None) -> tuple[str, ...]:
        route, share = next(iter(outcome.shares.items()))
        return (
            name, f"{outcome.fraction:.3f}", f"{outcome.distortion:.4f}", f"{outcome.agreement:.1%}",
            "" if trade_off is None else f"{trade_off:.4g}", f"{report.experts(route)} ({share:.0%})",
        )  # fmt: skip

    named: list[tuple[str, Outcome, float | None]] = [(f"budget {report.budget:g}", report.routed, report.trade_off)]
    if report.best_fixed is not None:
        named.append(("best fixed route", report.best_fixed[1], None))
    step = -(-len(report.budgets) // BUDGETS_SHOWN)
    table = list(zip(report.per_budget, report.budgets, strict=True))
    some = [pair for pair in [*table[:-1:step], table[-1]] if pair[0].fraction != report.routed.fraction]
    rows = [*named, *(("", outcome, budget.trade_off) for outcome, budget in some)]
    low, high = report.agreement_interval
    console.table(
        f"Budget {report.budget:g}, {report.samples}: the teacher's first choice in "
        f"{report.routed.agreement:.1%} (95% interval {low:.1%} to {high:.1%})",
        ["", "FLOPs", "KL (nats)", "top-1", "λ", "most frequent route"],
        [row(*each) for each in sorted(rows, key=lambda each: -each[1].fraction)],
        texts=["most frequent route"],
    )


def print_fidelity(title: str, groups: dict[str, "Figures"]) -> None:
    """Print accuracy, agreement and compute per group of samples."""
    rows = [
        (
            kind, f.count, f"{f.accuracy.teacher:.1%}" if f.accuracy else "",
            f"{f.accuracy.score.value:.1%}" if f.accuracy else "", f"{f.same_answer.value:.1%}",
            f"{f.fraction:.3f}", f"{f.visual_tokens:.0f}",
        )
        for kind, f in groups.items()
    ]  # fmt: skip
    columns = ["kind of question", "samples", "teacher", "pyramid", "same answer", "FLOPs", "visual tokens/layer"]
    console.table(title, columns, rows)


def print_evaluation(evaluation: "Evaluation") -> None:
    """Print every method's result, then the pyramid's by kind of question."""
    scored = evaluation.results[0].figures.accuracy is not None
    columns = ["budget", "method", "FLOPs", "KL (nats)", "over dpn, 95%", "top-1", "same answer"]
    columns += ["accuracy", "change, 95%", "McNemar p"] if scored else []
    rows = [_result_row(result) for result in evaluation.results]
    title = f"{len(evaluation.questions)} samples; the teacher is the original, and other methods spend what dpn spends"
    console.table(title, columns, rows, texts=["method"])
    pyramids = evaluation.of("dpn")
    for result in pyramids:
        if len(result.kinds) > 1:
            budget = f" at budget {result.budget:g}" if len(pyramids) > 1 else ""
            print_fidelity(f"dpn{budget}, by kind of question", {**result.kinds, "all": result.figures})
    for reason in evaluation.left_out:
        console.note(f"Left out: {reason}")
    for remark in evaluation.not_equal:
        console.note(f"Not equal: {remark}")


def _result_row(result: "Result") -> tuple[str, ...]:
    figures, accuracy = result.figures, result.figures.accuracy
    budget = "" if result.budget is None else f"{result.budget:g}"
    over = result.distortion_over_dpn
    row = (
        budget, result.label, f"{figures.fraction:.3f} ± {figures.fraction_spread:.3f}",
        f"{figures.distortion.value:.4f}", "" if over is None else f"{over.low:+.4f} … {over.high:+.4f}",
        f"{figures.agreement.value:.1%}", f"{figures.same_answer.value:.1%}",
    )  # fmt: skip
    if accuracy is None:
        return row
    change = f"{100 * accuracy.change.low:+.1f} … {100 * accuracy.change.high:+.1f}"
    return (*row, f"{accuracy.score.value:.1%}", change, f"{accuracy.mcnemar:.2g}")


def print_routes(evaluation: "Evaluation", name: "Callable[[Route], str]") -> None:
    """Print which routes every kind of question takes, the most frequent ones first, by their names."""
    kinds = dict.fromkeys(question.kind for question in evaluation.questions)
    rows = []
    for result in evaluation.of("dpn"):
        for kind in kinds:
            pairs = zip(evaluation.questions, result.per_sample, strict=True)
            routes = Counter(sample.route or () for question, sample in pairs if question.kind == kind)
            shares = [f"{name(r)} ({n / routes.total():.0%})" for r, n in routes.most_common(ROUTES_PER_KIND)]
            rows.append((kind, "; ".join(shares)))
    columns = ["kind of question", "routes, most frequent first"]
    console.table("Routes by kind of question", columns, rows, texts=columns)


def print_benchmarks(rows: "Sequence[Benchmark]") -> None:
    """Print the metrics of public benchmarks, teacher and pyramid side by side, each with its FLOPs."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    console.table(
        "Benchmarks by lmms-eval, in its units; after each figure, the fraction of the prefill FLOPs that it took",
        ["task", "metric", "samples", *(column for name in names for column in (name, "FLOPs"))],
        [
            (
                row.task, row.metric, row.samples,
                *(cell for name in names for cell in (f"{row.scores[name]:.4g}", f"{row.fractions.get(name, 1):.3f}")),
            )
            for row in rows
        ],
        texts=["metric"],
    )  # fmt: skip


def print_latency(result: "Latency", has_data: bool) -> None:
    """Print what every phase takes and, below, memory and FLOPs; with real prompts also what the first token keeps."""
    threads = f", {result.threads} threads" if result.device == "CPU" else ""
    console.table(
        f"Batch of {result.batch_size}, prompts of up to {result.prompt_tokens} tokens, {result.new_tokens} new ones; "
        f"{result.device}{threads}, {result.dtype}, {result.attention} attention; {result.rounds} rounds",
        ["method", "phase", "median, ms", "quartiles, ms", "speedup", "95% interval", "ideal speedup", "efficiency"],
        [row for each in result.measurements for row in _phase_rows(each)],
        texts=["phase"],
    )
    fidelity = ["KL (nats)", "same first token"] if has_data else []
    console.table(
        "Cost" + (", and fidelity of the first token to the original's" if has_data else ""),
        [
            "method",
            "FLOPs",
            "prefill GFLOPs",
            "tokens/s",
            "KV cache, MB",
            "peak, MB",
            *fidelity,
            "attention kernels",
        ],
        [_cost_row(each, result.batch_size, has_data) for each in result.measurements],
        texts=["attention kernels"],
    )


def _phase_rows(each: "Measurement") -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, phase in each.phases.items():
        ideal, reached = f"{each.ideal_speedup:.2f}", f"{phase.speedup / each.ideal_speedup:.0%}"
        rows.append(
            (
                each.name, PHASE_NAMES[name], f"{phase.median_s * 1e3:.1f}",
                f"{phase.low_s * 1e3:.1f} – {phase.high_s * 1e3:.1f}", f"{phase.speedup:.2f}",
                f"{phase.speedup_low:.2f} – {phase.speedup_high:.2f}",
                *((ideal, reached) if name == "prefill" else ("", "")),
            )
        )  # fmt: skip
    return rows


def _cost_row(each: "Measurement", batch_size: int, has_data: bool) -> list[str]:
    decode = each.phases.get("decode")
    return [
        each.name,
        f"{each.fraction:.3f}",
        f"{each.flops / 1e9:,.3g}",
        "" if decode is None else f"{batch_size / decode.median_s:.3g}",
        f"{each.kv_bytes / 1e6:,.3g}",
        "" if each.peak_bytes is None else f"{each.peak_bytes / 1e6:,.0f}",
        *([f"{each.distortion:.4f}", f"{each.agreement:.1%}"] if has_data else []),
        ", ".join(each.kernels) or "matrix products",
    ]
