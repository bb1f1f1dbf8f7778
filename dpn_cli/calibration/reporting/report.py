"""What a calibration reached: figures of held-out samples, for the user and for the record."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dpn_cli.calibration.cases import Case
from dpn_cli.calibration.policy import Outcome, Policy, fixed_routes, outcome
from dpn_cli.calibration.reporting.losses import losses
from dpn_cli.calibration.survey import Tried
from dpn_cli.inference.provenance import versions
from dpn_cli.intervals import wilson_interval
from dpn_cli.pyramid.budgets import Budget
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.cost import tokens_per_layer
from dpn_cli.pyramid.experts import Grid
from dpn_cli.pyramid.shape import DecoderShape

CASES = 10  # that are shown at either end


@dataclass(frozen=True)
class Report:
    """What a calibration reached; every figure is of held-out samples.

    Attributes:
        budget: Budget that was asked for.
        trade_off: the λ that it takes.
        routed: the calibrated model at that λ.
        full: the model with all visual tokens.
        best_fixed: the best fixed route that spends no more than the routed model, as (route, its outcome).
        agreement_interval: 95%, of `routed.agreement`.
        budgets: the whole table.
        per_budget: the calibrated model at every row of `budgets`.
        fixed: Outcome of every route, if all samples take it.
        visual_tokens: Mean number of visual tokens over the samples, per decoder layer.
        visual_tokens_full: the same where nothing is pooled.
        sites: the layer before every site, and the names of its experts.
        cases: Held-out samples that both models answered, the one with the largest distortion first.
        settings: Settings of the run, for the record.
        versions: Versions of the packages that it was run with.
        origin: What was calibrated, by which recipe, when and on what device, for the reader.
        tried: the candidate routes of the survey, the dearest first; empty where the routes were given.
    """

    budget: float
    trade_off: float
    routed: Outcome
    full: Outcome
    best_fixed: tuple[Route, Outcome] | None
    agreement_interval: tuple[float, float]
    budgets: tuple[Budget, ...]
    per_budget: tuple[Outcome, ...]
    fixed: dict[Route, Outcome]
    visual_tokens: list[float]
    visual_tokens_full: list[float]
    sites: list[tuple[int, list[str]]]
    cases: list[Case]
    settings: dict[str, Any]
    versions: dict[str, str]
    origin: dict[str, str]
    tried: tuple[Tried, ...] = ()

    @property
    def worst(self) -> list[Case]:
        """The samples with the largest distortion, the largest first."""
        return self.cases[:CASES]

    @property
    def best(self) -> list[Case]:
        """The samples with the smallest distortion, the smallest first, none of them among the worst."""
        return self.cases[CASES:][-CASES:][::-1]

    @property
    def changed(self) -> list[Case]:
        """The samples whose answer is not the original's, the largest distortion first."""
        return [case for case in self.cases if case.has_changed]

    @property
    def reference(self) -> str:
        """What the figures compare with, in a word: the model's own original, or another teacher."""
        measured = self.settings.get("budgets_solved_on", self.settings)
        return "teacher" if measured.get("teacher") else "original"

    @property
    def samples(self) -> str:
        """What the figures are of, in words."""
        known = "samples on which λ was solved" if "budgets_solved_on" in self.settings else "held-out samples"
        return f"{self.settings['held_out']} {known}"

    @classmethod
    def of(
        cls,
        policy: Policy,
        pyramid: PyramidConfig,
        shape: DecoderShape,
        grids: Sequence[tuple[Grid, ...]],
        budget: float,
        cases: Sequence[Case],
        settings: dict[str, Any],
        origin: dict[str, str],
    ) -> "Report":
        """Sum a calibration up.

        Args:
            policy: What the fitted routers choose for the held-out samples.
            pyramid: Calibrated pyramid, with the budget table and the λ for the budget.
            shape: Shape of the decoder.
            grids: Visual grids, per held-out sample.
            budget: Budget that was asked for.
            cases: Held-out samples that both models answered, the one with the largest distortion first.
            settings: Settings of the run.
            origin: What was calibrated, by which recipe, when and on what device.
        """
        held, taken = policy.table, policy.choose_as(pyramid, pyramid.trade_off)
        routed, fixed = outcome(held, taken), fixed_routes(held)
        affordable = {route: o for route, o in fixed.items() if o.fraction <= routed.fraction}
        cheapest = min(affordable, key=lambda route: affordable[route].distortion, default=None)
        routes = [held.tree.routes[i] for i in taken.tolist()]
        return cls(
            budget=budget,
            trade_off=pyramid.trade_off,
            routed=routed,
            full=fixed[pyramid.full_route],
            best_fixed=None if cheapest is None else (cheapest, affordable[cheapest]),
            agreement_interval=wilson_interval(routed.agreement * len(taken), len(taken)),
            budgets=pyramid.budgets,
            per_budget=tuple(outcome(held, policy.choose_as(pyramid, row.trade_off)) for row in pyramid.budgets),
            fixed=fixed,
            visual_tokens=_visual_tokens(pyramid, shape, routes, grids),
            visual_tokens_full=_visual_tokens(pyramid, shape, [pyramid.full_route] * len(routes), grids),
            sites=[(site.after_layer, list(map(str, site.experts))) for site in pyramid.sites],
            cases=list(cases),
            settings={**settings, "held_out": len(taken)},
            versions=versions(),
            origin=origin,
        )

    def experts(self, route: Route) -> str:
        """Return a route by its experts' names, as `format_route` does."""
        return ",".join(experts[k] for k, (_, experts) in zip(route, self.sites, strict=True))

    def summary(self) -> dict[str, Any]:
        """Return what config.json remembers of a calibration."""
        return {
            **self.settings,
            "distortion": self.routed.distortion,
            "agreement": self.routed.agreement,
            "agreement_interval": list(self.agreement_interval),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        best_fixed = self.best_fixed and {"route": list(self.best_fixed[0]), **_plain(self.best_fixed[1])}
        return {
            "budget": self.budget,
            "trade_off": self.trade_off,
            "routed": _plain(self.routed),
            "full": _plain(self.full),
            "best_fixed": best_fixed,
            "agreement_interval": list(self.agreement_interval),
            "budgets": [asdict(row) for row in self.budgets],
            "per_budget": [_plain(each) for each in self.per_budget],
            "fixed": [{"route": list(route), **_plain(each)} for route, each in self.fixed.items()],
            "visual_tokens": self.visual_tokens,
            "visual_tokens_full": self.visual_tokens_full,
            "sites": [{"after_layer": layer, "experts": experts} for layer, experts in self.sites],
            "worst": [case.to_dict() for case in self.worst],
            "best": [case.to_dict() for case in self.best],
            "settings": self.settings,
            "versions": self.versions,
            "origin": self.origin,
            "changed": [case.to_dict() for case in self.changed],
            "losses": [asdict(loss) for loss in losses(self.cases)],
            "tried": [asdict(each) for each in self.tried],
        }


def _visual_tokens(
    pyramid: PyramidConfig, shape: DecoderShape, routes: Sequence[Route], grids: Sequence[tuple[Grid, ...]]
) -> list[float]:
    """Return the mean visual tokens of every decoder layer."""
    counts = [tokens_per_layer(shape, pyramid, *each, text_tokens=0) for each in zip(routes, grids, strict=True)]
    return torch.tensor(counts, dtype=torch.float64).mean(0).tolist()


def _plain(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome with routes as text, as JSON's keys must be."""
    shares = {",".join(map(str, route)): share for route, share in outcome.shares.items()}
    return {**asdict(outcome), "shares": shares}
