"""The tables that more than one command prints: a few columns that fit 80 characters, or all of them (`--wide`)."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dpn_cli import console
from dpn_cli.notation import nats, percent
from dpn_cli.pyramid.experts import KINDS, Expert

if TYPE_CHECKING:
    from dpn_cli.calibration.policy import Outcome
    from dpn_cli.calibration.reporting.report import Report
    from dpn_cli.evaluation.evaluate import Evaluation, Result
    from dpn_cli.evaluation.figures import Figures
    from dpn_cli.evaluation.harness import Benchmark
    from dpn_cli.evaluation.latency import Latency, Measurement
    from dpn_cli.pyramid.config import Route, Site

PHASE_NAMES = {
    "vision": "vision tower",
    "prefill": "prefill",
    "first_token": "first token",
    "decode": "decode, per token",
}
BUDGETS_SHOWN = 10
Row = TypeVar("Row")
ROUTES_PER_KIND = 2
MEANINGS = {
    "FLOPs": "share of the prefill FLOPs of the original language model",
    "KL": "distance of the answer's token probabilities from the {reference}'s, in nats",
    "top-1": "share of the answer tokens for which the most likely token is the {reference}'s",
    "λ": "what the routers are charged for FLOPs, solved for the budget",
    "most frequent route": "in brackets the share of the samples that take it",
    "over dpn": "95% interval of the difference from dpn's KL",
    "same answer": "word for word the original's",
    "original": "right answers of the original, by the labels",
    "dpn": "right answers of the pyramid",
    "tokens": "visual tokens per layer, the mean",
    "accuracy": "right answers, by the labels",
    "change": "95% interval of the accuracy's difference from the original's, in points",
    "McNemar p": "how likely such a change is by chance",
    "first token": "from the encoded prompt to the first token, the vision tower included",
    "prefill": "the language model alone",
    "speedup": "of the prefill, paired by round, with its 95% interval",
    "per token": "of the answer, after the first",
    "peak": "the most memory in use",
    "same token": "samples whose most likely first token is the original's",
}
"""What a word at the head of a column means, for who sees it for the first time; see `meaning`."""


SETTINGS = {
    "cells": "1x2 is a cell of one row and two columns.",
    "share": "A number is the share of the tokens that stay.",
    "share+cells": "With +8x8, the other tokens of every cell of 8×8 are merged into one.",
}
"""What the settings of experts mean, by the forms that they may take."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        head: Name of the column, with its unit.
        cell: returns what it shows of an item.
        wide: whether only `--wide` shows it.
        text: whether it is aligned to the left and may be wrapped.
        means: the key in `MEANINGS` of what the legend says about it; empty for nothing.
    """

    head: str
    cell: Callable[[Any], object]
    wide: bool = False
    text: bool = False
    means: str = ""


def meaning(word: str, reference: str = "original") -> str:
    """Return a word with what it means, where answers are compared with those of the reference."""
    return f"{word}: {MEANINGS[word].format(reference=reference)}"


def show(
    title: str,
    columns: Sequence[Column],
    items: Sequence[Any],
    wide: bool,
    reference: str = "original",
    more: str = "",
) -> None:
    """Print a table of items, one a row, and what its columns mean.

    Args:
        title: Title of the table.
        columns: All columns.
        items: What the rows show.
        wide: Whether all columns are shown.
        reference: Name of the model that answers are compared with.
        more: Further sentences of the legend.
    """
    shown = [column for column in columns if wide or not column.wide]
    legend = "; ".join(meaning(column.means, reference) for column in shown if column.means)
    console.table(
        title,
        [column.head for column in shown],
        [[column.cell(item) for column in shown] for item in items],
        texts=[column.head for column in shown if column.text],
        legend=" ".join(filter(None, [f"{legend}." if legend else "", more])),
    )


def show_sites(title: str, sites: "Sequence[Site]", more: str = "", is_fixed: bool = False) -> None:
    """Print the sites of a pyramid with their experts, and what these words and all of the experts mean.

    Args:
        title: Title of the table.
        sites: Sites in the order of the layers.
        more: Further sentences of the legend.
        is_fixed: Whether all samples take one route.
    """
    who = "the one on the route, the same for every sample" if is_fixed else "which a router picks for every sample"
    legend = f"A site is where visual tokens are reduced: by one of its experts, {who}."
    about = about_experts(expert for site in sites for expert in site.experts)
    rows = [(str(site), ", ".join(map(str, site.experts))) for site in sites]
    console.table(title, ["site", "experts"], rows, ["experts"], " ".join(filter(None, [legend, about, more])))


def about_experts(experts: "Iterable[Expert]") -> str:
    """Return in sentences what experts do, and what their settings mean."""
    experts = list(experts)
    kinds = dict.fromkeys(expert.kind for expert in experts)
    forms = {"share" for each in experts if each.share}
    forms |= {"share+cells" if each.share else "cells" for each in experts if each.cells}
    return " ".join(
        [
            f"Experts: {'; '.join(f'{kind} ({KINDS[kind].about})' for kind in kinds)}.",
            *(sentence for form, sentence in SETTINGS.items() if form in forms),
        ]
    )


def _about_routes(routes: Iterable[str]) -> str:
    """Return in sentences what a route is, and what the experts of these do."""
    names = dict.fromkeys(name for route in routes for name in route.split(","))
    return f"A route is one expert per site, in the order of the layers. {about_experts(map(Expert.parse, names))}"


def some_budgets(rows: Sequence[Row], wide: bool) -> list[Row]:
    """Return all rows of a budget table if it is wide, else about `BUDGETS_SHOWN` of them, the last one included."""
    return [*rows[: -1 : 1 if wide else -(-len(rows) // BUDGETS_SHOWN)], rows[-1]]


def print_calibration(report: "Report", wide: bool = False) -> None:
    """Print what a calibration reached on its held-out samples: any budget, the chosen one and fixed routes' best."""
    rows: list[tuple[str, Outcome, float | None]] = [
        (f"{report.budget:g} (asked)", report.routed, report.trade_off),
        *([("best fixed", report.best_fixed[1], None)] if report.best_fixed else []),
        *([("every token kept", report.full, None)] if report.reference == "teacher" else []),
    ]
    table = some_budgets(list(zip(report.per_budget, report.budgets, strict=True)), wide)
    rows += [("", outcome, budget.trade_off) for outcome, budget in table if outcome.fraction != report.routed.fraction]

    def route(row: "tuple[str, Outcome, float | None]") -> str:
        taken, share = next(iter(row[1].shares.items()))
        return report.experts(taken) + (f" ({share:.0%})" if row[2] is not None else "")

    taken = [report.experts(next(iter(outcome.shares))) for _, outcome, _ in rows]
    others = " Rows without a name are other budgets, which need no new calibration."
    fixed = " Best fixed: the best single route for all samples within the budget." if report.best_fixed else ""
    low, high = report.agreement_interval
    show(
        f"Budget {report.budget:g}, {report.samples}: {report.routed.agreement:.1%} of the answer tokens are the "
        f"{report.reference}'s first choice (95% interval {low:.1%} to {high:.1%})",
        [
            Column("budget", lambda row: row[0], text=True),
            Column("FLOPs", lambda row: f"{row[1].fraction:.3f}", means="FLOPs"),
            Column("KL", lambda row: nats(row[1].distortion), means="KL"),
            Column("top-1", lambda row: percent(row[1].agreement), means="top-1"),
            Column("λ", lambda row: "" if row[2] is None else f"{row[2]:.4g}", wide=True, means="λ"),
            Column("most frequent route", route, text=True, means="most frequent route"),
        ],
        sorted(rows, key=lambda row: -row[1].fraction),
        wide,
        report.reference,
        _about_routes(taken) + others + fixed,
    )


def print_fidelity(title: str, groups: dict[str, "Figures"]) -> None:
    """Print accuracy, agreement and compute per group of samples."""
    scored = any(figures.accuracy for figures in groups.values())
    accuracy = [
        Column("original", lambda g: percent(g[1].accuracy.teacher) if g[1].accuracy else "", means="original"),
        Column("dpn", lambda g: percent(g[1].accuracy.score.value) if g[1].accuracy else "", means="dpn"),
    ]
    show(
        title,
        [
            Column("kind of question", lambda g: g[0], text=True),
            Column("samples", lambda g: g[1].count),
            *(accuracy if scored else []),
            Column("same answer", lambda g: percent(g[1].same_answer.value), means="same answer"),
            Column("FLOPs", lambda g: f"{g[1].fraction:.3f}", means="FLOPs"),
            Column("tokens", lambda g: f"{g[1].visual_tokens:.0f}", means="tokens"),
        ],
        list(groups.items()),
        wide=False,
    )


def print_evaluation(evaluation: "Evaluation", wide: bool = False) -> None:
    """Print every method's result, then the pyramid's by kind of question."""
    scored, pyramids = evaluation.results[0].figures.accuracy is not None, evaluation.pyramids
    show(
        f"{len(evaluation.questions)} samples: the original and dpn"
        + (", and other methods at the FLOPs of dpn" if len(pyramids) + 1 < len(evaluation.results) else ""),
        [*_RESULT_COLUMNS, *(_ACCURACY_COLUMNS if scored else [])],
        evaluation.results,
        wide,
    )
    for result in pyramids:
        if len(result.kinds) > 1:
            budget = f" at budget {result.budget:g}" if len(pyramids) > 1 else ""
            print_fidelity(f"dpn{budget}, by kind of question", {**result.kinds, "all": result.figures})
    for reason in evaluation.left_out:
        console.note(f"Left out: {reason}")
    for remark in evaluation.not_equal:
        console.note(f"Not equal: {remark}")


def _over(result: "Result") -> str:
    over = result.distortion_over_dpn
    return "" if over is None else f"{over.low:+.4f} … {over.high:+.4f}"


def _change(result: "Result") -> str:
    accuracy = result.figures.accuracy
    assert accuracy is not None
    return f"{100 * accuracy.change.low:+.1f} … {100 * accuracy.change.high:+.1f}"


_RESULT_COLUMNS = [
    Column("budget", lambda r: "" if r.budget is None else f"{r.budget:g}", text=True),
    Column("method", lambda r: r.label, text=True),
    Column("FLOPs", lambda r: f"{r.figures.fraction:.3f}", means="FLOPs"),
    Column("±", lambda r: f"{r.figures.fraction_spread:.3f}", wide=True),
    Column("KL", lambda r: nats(r.figures.distortion.value), means="KL"),
    Column("over dpn", _over, wide=True, means="over dpn"),
    Column("top-1", lambda r: percent(r.figures.agreement.value), wide=True, means="top-1"),
    Column("same answer", lambda r: percent(r.figures.same_answer.value), means="same answer"),
]
_ACCURACY_COLUMNS = [
    Column("accuracy", lambda r: percent(r.figures.accuracy.score.value), means="accuracy"),
    Column("change", _change, means="change"),
    Column("McNemar p", lambda r: f"{r.figures.accuracy.mcnemar:.2g}", wide=True, means="McNemar p"),
]


def print_routes(evaluation: "Evaluation", name: "Callable[[Route], str]") -> None:
    """Print which routes every kind of question takes, the most frequent ones first, by their names."""
    kinds = dict.fromkeys(question.kind for question in evaluation.questions)
    rows, names = [], []
    for result in evaluation.pyramids:
        for kind in kinds:
            pairs = zip(evaluation.questions, result.per_sample, strict=True)
            routes = Counter(sample.route or () for question, sample in pairs if question.kind == kind)
            shown = [(name(route), count) for route, count in routes.most_common(ROUTES_PER_KIND)]
            shares = [f"{text} ({count / routes.total():.0%})" for text, count in shown]
            names += [text for text, _ in shown]
            rows.append((kind, "\n".join(shares)))
    columns = ["kind of question", "routes, most frequent first"]
    console.table("Routes by kind of question", columns, rows, texts=columns, legend=_about_routes(names))


def print_benchmarks(rows: "Sequence[Benchmark]") -> None:
    """Print the metrics of public benchmarks, a line for every method, the teacher first."""
    lines = [(row, name) for row in rows for name in row.scores]
    show(
        "Benchmarks by lmms-eval, in its units",
        [
            Column("task", lambda line: line[0].task, text=True),
            Column("metric", lambda line: line[0].metric, text=True),
            Column("samples", lambda line: line[0].samples),
            Column("method", lambda line: line[1], text=True),
            Column("score", lambda line: f"{line[0].scores[line[1]]:.4g}"),
            Column("FLOPs", lambda line: f"{line[0].fractions.get(line[1], 1):.3f}", means="FLOPs"),
        ],
        lines,
        wide=False,
    )


def print_latency(result: "Latency", has_data: bool, wide: bool = False) -> None:
    """Print the times, speedups and memory of every method; wide, every phase and all costs in a table each."""
    threads = f", {result.threads} thread{'s' * (result.threads > 1)}" if result.device == "CPU" else ""
    title = (
        f"Batch of {result.batch_size}, prompts of up to {result.prompt_tokens} tokens, {result.new_tokens} new ones; "
        f"{result.device}{threads}, {result.dtype}, {result.attention} attention; {result.rounds} rounds"
    )
    if wide:
        _print_phases(title, result)
        _print_costs(result, has_data)
        return
    costs = [
        Column("ms per token", lambda m: _median(m, "decode"), means="per token"),
        Column("peak MB", _peak, means="peak"),
    ]
    fidelity = [
        Column("KL", lambda m: nats(m.distortion), means="KL"),
        Column("same token", lambda m: percent(m.agreement), means="same token"),
    ]
    show(
        title,
        [
            Column("method", lambda m: m.name, text=True),
            Column("FLOPs", lambda m: f"{m.fraction:.3f}", means="FLOPs"),
            Column("first token ms", lambda m: _median(m, "first_token"), means="first token"),
            Column("prefill ms", lambda m: _median(m, "prefill"), means="prefill"),
            Column("speedup", _speedup, text=True, means="speedup"),
            *(fidelity if has_data else costs),
        ],
        result.measurements,
        wide,
    )


def _median(each: "Measurement", name: str) -> str:
    return f"{each.phases[name].median_s * 1e3:.1f}" if name in each.phases else ""


def _speedup(each: "Measurement") -> str:
    phase = each.phases["prefill"]
    return f"{phase.speedup:.2f} ({phase.speedup_low:.2f}–{phase.speedup_high:.2f})"


def _peak(each: "Measurement") -> str:
    return "" if each.peak_bytes is None else f"{each.peak_bytes / 1e6:,.0f}"


def _print_phases(title: str, result: "Latency") -> None:
    console.table(
        title,
        ["method", "phase", "median, ms", "quartiles, ms", "speedup", "95% interval", "ideal speedup", "efficiency"],
        [row for each in result.measurements for row in _phase_rows(each)],
        texts=["method", "phase"],
        legend="Speedups are paired by round; the ideal one is that of the FLOPs, and efficiency the share of it that "
        "is reached.",
    )


def _print_costs(result: "Latency", has_data: bool) -> None:
    fidelity = ["KL (nats)", "same first token"] if has_data else []
    costs = ["method", "FLOPs", "prefill GFLOPs", "tokens/s", "KV cache, MB", "peak, MB"]
    console.table(
        "Cost" + (", and fidelity of the first token to the original's" if has_data else ""),
        [*costs, *fidelity, "attention kernels"],
        [_cost_row(each, result.batch_size, has_data) for each in result.measurements],
        texts=["method", "attention kernels"],
        legend=f"{meaning('FLOPs')}; {meaning('peak')}.",
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
        _peak(each),
        *([nats(each.distortion), percent(each.agreement)] if has_data else []),
        ", ".join(each.kernels) or "matrix products",
    ]
