"""The tables that more than one command prints."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpn_cli import console

if TYPE_CHECKING:
    from dpn_cli.calibration.policy import Outcome
    from dpn_cli.calibration.report import Report
    from dpn_cli.evaluation.fidelity import Answered, Fidelity
    from dpn_cli.modeling.pyramid_config import Route

ROUTES_SHOWN = 6
ROUTES_PER_KIND = 3


def print_calibration(report: "Report") -> None:
    """Print what a calibration reached on its held-out samples."""

    def row(name: str, outcome: "Outcome") -> tuple[str, ...]:
        return name, f"{outcome.fraction:.3f}", f"{outcome.distortion:.4f}", f"{outcome.agreement:.1%}"

    rows = [row("full (teacher)", report.full), row(f"routed, budget {report.budget:g}", report.routed)]
    if report.best_fixed is not None:
        route, fixed = report.best_fixed
        rows.append(row(f"best fixed route {route_name(route)}", fixed))
    title = f"Held out: {report.settings['held_out']} samples"
    console.table(title, ["", "FLOPs", "KL (nats)", "top-1 = teacher"], rows)
    low, high = report.agreement_interval
    console.table("Routed top-1 agreement, 95% interval", ["low", "high"], [(f"{low:.1%}", f"{high:.1%}")])
    shares = list(report.routed.shares.items())[:ROUTES_SHOWN]
    console.table("Routes taken", ["experts", "share"], [(route_name(r), f"{share:.1%}") for r, share in shares])
    step = max(1, len(report.budgets) // 10)
    budgets = [*report.budgets[:-1:step], report.budgets[-1]]
    console.table(
        "Any budget from this calibration", ["budget", "λ", "KL (nats)"],
        [(f"{b.fraction:.3f}", f"{b.trade_off:.4g}", f"{b.distortion:.4f}") for b in budgets],
    )  # fmt: skip


def print_fidelity(title: str, groups: dict[str, "Fidelity"]) -> None:
    """Print accuracy, agreement and compute per group of samples."""
    rows = [
        (
            kind, f.count, f"{f.teacher_accuracy:.1%}", f"{f.student_accuracy:.1%}", f"{f.agreement:.1%}",
            f"{f.fraction:.3f}", f"{f.visual_tokens:.0f}",
        )
        for kind, f in groups.items()
    ]  # fmt: skip
    columns = [
        "kind of question",
        "samples",
        "teacher",
        "pyramid",
        "same answer",
        "FLOPs",
        "visual tokens/layer",
    ]
    console.table(title, columns, rows)


def print_routes(answers: "Sequence[Answered]") -> None:
    """Print which routes every kind of question takes, the most frequent ones first."""
    rows = []
    for kind in dict.fromkeys(a.kind for a in answers):
        routes = Counter(a.route for a in answers if a.kind == kind)
        shares = [f"{route_name(r)} {n / routes.total():.0%}" for r, n in routes.most_common(ROUTES_PER_KIND)]
        rows.append((kind, "   ".join(shares)))
    console.table("Routes by kind of question", ["kind of question", "experts per site, most frequent first"], rows)


def route_name(route: "Route | Sequence[int]") -> str:
    """Return a route as its expert indices, (0, 1, 2)."""
    return "(" + ", ".join(map(str, route)) + ")"
