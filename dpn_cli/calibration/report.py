"""What a calibration reached: figures of held-out samples, for the user and for the record."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dpn_cli.calibration.data import Sample
from dpn_cli.calibration.policy import Outcome, fixed_routes, outcome
from dpn_cli.calibration.rollout import RouteTable
from dpn_cli.calibration.statistics import wilson_interval
from dpn_cli.modeling.pyramid_config import Budget, PyramidConfig, Route

WORST = 10  # samples that the report lists


@dataclass(frozen=True)
class Report:
    """What a calibration reached; every figure is of held-out samples.

    Attributes:
        budget: asked for.
        trade_off: the λ that it takes.
        routed: the calibrated model at that λ.
        full: the model that pools nothing.
        best_fixed: the best fixed route that spends no more than the routed model, as (route, its outcome).
        agreement_interval: 95%, of `routed.agreement`.
        budgets: the whole table.
        worst: the samples with the largest distortion.
        settings: what was run, for the record.
    """

    budget: float
    trade_off: float
    routed: Outcome
    full: Outcome
    best_fixed: tuple[Route, Outcome] | None
    agreement_interval: tuple[float, float]
    budgets: tuple[Budget, ...]
    worst: list[dict[str, Any]]
    settings: dict[str, Any]

    @classmethod
    def of(
        cls,
        held: RouteTable,
        samples: Sequence[Sample],
        taken: torch.Tensor,
        pyramid: PyramidConfig,
        budget: float,
        settings: dict[str, Any],
    ) -> "Report":
        """Sum a calibration up.

        Args:
            held: measurements of the held-out samples.
            samples: the same samples.
            taken: the index of the route that each takes, [N].
            pyramid: with the budget table and the λ for the budget.
            budget: asked for.
            settings: what was run.
        """
        routed, fixed = outcome(held, taken), fixed_routes(held)
        affordable = {route: o for route, o in fixed.items() if o.fraction <= routed.fraction}
        best = min(affordable, key=lambda route: affordable[route].distortion, default=None)
        return cls(
            budget=budget,
            trade_off=pyramid.trade_off,
            routed=routed,
            full=fixed[pyramid.full_route],
            best_fixed=None if best is None else (best, affordable[best]),
            agreement_interval=wilson_interval(routed.agreement * len(taken), len(taken)),
            budgets=pyramid.budgets,
            worst=_worst(held, samples, taken),
            settings={**settings, "held_out": len(taken)},
        )

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
        data = {**asdict(self), "routed": _plain(self.routed), "full": _plain(self.full)}
        if self.best_fixed is not None:
            route, fixed = self.best_fixed
            data["best_fixed"] = {"route": list(route), **_plain(fixed)}
        return data


def _worst(held: RouteTable, samples: Sequence[Sample], taken: torch.Tensor) -> list[dict[str, Any]]:
    distortion = held.distortion[torch.arange(len(taken)), taken]
    return [
        {
            "id": samples[i].id,
            "question": samples[i].turns[0].question,
            "answer": samples[i].turns[0].answer,
            "distortion": distortion[i].item(),
            "route": list(held.tree.routes[int(taken[i])]),
        }
        for i in distortion.argsort(descending=True)[:WORST].tolist()
    ]


def _plain(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome with routes as text, as JSON's keys must be."""
    shares = {",".join(map(str, route)): share for route, share in outcome.shares.items()}
    return {**asdict(outcome), "shares": shares}
