"""A calibration's report as one page that needs nothing else: what was lost, then plots, budgets and settings."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dpn_cli.calibration.policy import Outcome
from dpn_cli.calibration.reporting.losses import losses
from dpn_cli.calibration.reporting.report import Report
from dpn_cli.calibration.survey import Tried
from dpn_cli.intervals import wilson_interval
from dpn_cli.notation import nats, percent
from dpn_cli.pages import svg
from dpn_cli.pages.rendering import render_page
from dpn_cli.pyramid.config import Route

TEMPLATE = "report.html.jinja"
BARS = 9
CHANGED = 20  # answers that are shown side by side
FLOPS = "prefill FLOPs, share of the original's"


@dataclass(frozen=True)
class Row:
    """A line of the table of budgets."""

    outcome: Outcome
    trade_off: float
    chosen: bool = False


def render(report: Report) -> str:
    """Return the page.

    Args:
        report: the images of its samples are read once more.

    Raises:
        DataError: if an image cannot be read.
    """
    coloured, others = _colours(report)
    return render_page(
        "dpn_cli.calibration.reporting",
        TEMPLATE,
        report=report,
        rows=_rows(report),
        fidelity=_tradeoff(report, "distortion"),
        agreement=_tradeoff(report, "agreement"),
        shares=_shares(report, coloured),
        legend=[(colour, report.experts(route)) for route, colour in coloured.items()],
        others=others,
        tokens=_tokens(report),
        survey=_survey(report) if report.tried else None,
        shown=CHANGED,
        losses=losses(report.cases),
        changed_interval=wilson_interval(len(report.changed), len(report.cases)) if report.cases else None,
        settings=[(key, _plain(value)) for key, value in (report.settings | report.versions).items()],
    )


def _tradeoff(report: Report, figure: str) -> Markup:
    """Plot a figure against FLOPs: the calibrated model as a curve, fixed routes as dots."""

    def value(each: Outcome) -> float:
        return float(getattr(each, figure))

    def dot(each: Outcome, name: str) -> svg.Dot:
        figures = f"KL {nats(each.distortion)}, top-1 {percent(each.agreement)}"
        return svg.Dot(each.fraction, value(each), f"{name}: {percent(each.fraction)} FLOPs, {figures}")

    fixed = sorted(report.fixed.items(), key=lambda item: item[1].fraction)
    values = [value(each) for each in (*report.per_budget, *report.fixed.values(), report.routed)]
    better = min if figure == "distortion" else max
    envelope = [
        (each.fraction, better(value(o) for _, o in fixed[: i + 1])) for i, (_, each) in enumerate(fixed)
    ]  # fmt: skip
    cheapest = min(each.fraction for each in (*report.fixed.values(), *report.per_budget))
    if figure == "distortion":
        y, name = svg.vertical_log(values), f"KL from the {report.reference}, nats per token"
    else:
        y, name = svg.vertical(min(values) - 0.01, 1.0, percent=True), f"top-1 agreement with the {report.reference}"
    return svg.tradeoff_plot(
        svg.horizontal(cheapest - 0.02, 1.0, percent=True), y, (FLOPS, name),
        curve=[dot(each, "routed") for each in report.per_budget],
        envelope=envelope,
        dots=[dot(each, f"fixed {report.experts(route)}") for route, each in fixed],
        chosen=dot(report.routed, f"routed, budget {report.budget:g}"),
        name=f"{name}, against {FLOPS}",
    )  # fmt: skip


def _survey(report: Report) -> Markup:
    """Plot the candidates of the survey, distortion against FLOPs: those that were chosen in a colour of their own."""

    def dot(each: Tried) -> svg.Dot:
        figures = f"{percent(each.fraction)} FLOPs, KL {nats(each.distortion)}, top-1 {percent(each.agreement)}"
        return svg.Dot(each.fraction, each.distortion, f"{each.experts}: {figures}")

    y = svg.vertical_log([each.distortion for each in report.tried])
    x = svg.horizontal(min(each.fraction for each in report.tried) - 0.02, 1.0, percent=True)
    return svg.scatter_plot(
        x, y, (FLOPS, f"KL from the {report.reference}, nats per token"),
        [[dot(each) for each in report.tried if each.chosen], [dot(each) for each in report.tried if not each.chosen]],
        name=f"KL of the candidate routes, against {FLOPS}",
    )  # fmt: skip


def _rows(report: Report) -> list[Row]:
    """Return some budgets of the table and the chosen one, the dearest first."""
    rows = [Row(o, b.trade_off) for o, b in zip(report.per_budget, report.budgets, strict=True)]
    step = max(1, -(-len(rows) // BARS))
    some = [*rows[:-1:step], rows[-1]]
    chosen = Row(report.routed, report.trade_off, chosen=True)
    near = step * 0.01
    some = [row for row in some if abs(row.outcome.fraction - report.routed.fraction) > near]
    return sorted([*some, chosen], key=lambda row: -row.outcome.fraction)


def _colours(report: Report) -> tuple[dict[Route, int], bool]:
    """Return the colours of the routes that are taken most, the dearest first, and whether there are others."""
    total: dict[Route, float] = {}
    for row in _rows(report):
        for route, share in row.outcome.shares.items():
            total[route] = total.get(route, 0.0) + share
    most = sorted(total, key=lambda route: -total[route])[: svg.NUM_COLOURS - 1]
    most.sort(key=lambda route: (-report.fixed[route].fraction if route in report.fixed else 0.0, route))
    return {route: colour for colour, route in enumerate(most)}, len(total) > len(most)


def _shares(report: Report, coloured: dict[Route, int]) -> Markup:
    """Plot which routes are taken at which budget."""

    def parts(shares: dict[Route, float]) -> Iterator[tuple[int, float, str]]:
        for route, colour in coloured.items():
            if share := shares.get(route, 0.0):
                yield colour, share, f"{report.experts(route)}: {percent(share)}"
        if rest := sum(share for route, share in shares.items() if route not in coloured):
            yield svg.NUM_COLOURS - 1, rest, f"other routes: {percent(rest)}"

    bars = [(f"{100 * row.outcome.fraction:.0f}", row.chosen, list(parts(row.outcome.shares))) for row in _rows(report)]
    return svg.stacked_bars(bars, ("prefill FLOPs, % of the original's", "share of the samples"))


def _tokens(report: Report) -> Markup:
    """Plot the visual tokens of every layer."""
    return svg.staircase(
        report.visual_tokens, report.visual_tokens_full, [layer for layer, _ in report.sites],
        ("decoder layer", "visual tokens, mean"), "layer {step}: {value:.0f} of {reference:.0f} visual tokens",
    )  # fmt: skip


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
