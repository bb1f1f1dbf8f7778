"""What a calibration reached."""

from typing import TYPE_CHECKING

from dpn_cli.commands.tables.columns import Column, show, some_budgets
from dpn_cli.commands.tables.experts import about_routes
from dpn_cli.notation import nats, percent

if TYPE_CHECKING:
    from dpn_cli.calibration.policy import Outcome
    from dpn_cli.calibration.reporting.report import Report


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
        about_routes(taken) + others + fixed,
    )
