"""What methods answer: by budget, by kind of question, by route, and on public benchmarks."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpn_cli import console
from dpn_cli.commands.tables.columns import Column, show
from dpn_cli.commands.tables.experts import about_routes
from dpn_cli.notation import nats, percent

if TYPE_CHECKING:
    from dpn_cli.evaluation.evaluate import Evaluation, Result
    from dpn_cli.evaluation.figures import Figures
    from dpn_cli.evaluation.harness import Benchmark
    from dpn_cli.pyramid.config import Route

ROUTES_PER_KIND = 2


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
    console.table("Routes by kind of question", columns, rows, texts=columns, legend=about_routes(names))


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
