"""From routers to the budget table: which λ spends how much, and what it costs in fidelity."""

from collections.abc import Sequence

import torch
from torch import nn

from dpn_cli.calibration.policy import Policy, outcome
from dpn_cli.calibration.rollout import RouteTable
from dpn_cli.pyramid.config import Budget

STEP = 0.02  # between the rows of the table, in fractions of the full prefill
HIGHEST = 1e6  # λ, in nats per whole prefill: beyond any distortion
BISECTIONS = 60
MARGIN, LEAST_GAIN = 0.1, 0.002  # of the distortion, and in nats: less is not worth another rule
TRUSTS = (1.0, 0.75, 0.5, 0.25, 0.0)  # in the predictions of routers, those that are tried


def budget_table(
    routers: nn.ModuleList, table: RouteTable, mean_distortions: Sequence[float] = ()
) -> tuple[Budget, ...]:
    """Solve λ for budgets from 1.0 to the cheapest, so that each is met in the mean over a table.

    A row trusts the routers' predictions less only where that is clearly better on the table, down to not at all, where
    all samples take one route.

    Args:
        routers: fitted.
        table: samples that the routers were not fitted to.
        mean_distortions: of the routes, to shrink predictions to; empty to trust them all the way.

    Returns:
        Rows of falling fraction and rising λ, the cheapest reachable one last.
    """
    with torch.no_grad():
        policy = Policy.of(routers, table)
    trusts = TRUSTS if mean_distortions else (1.0,)

    def spend(trade_off: float, trust: float) -> Budget:
        taken = outcome(table, policy.choose(trade_off, trust, mean_distortions))
        return Budget(taken.fraction, trade_off, taken.distortion, trust)

    def solve(wanted: float, low: float, trust: float) -> Budget:
        """Return the row of the smallest λ from `low` on that spends no more than wanted."""
        up = HIGHEST
        for _ in range(BISECTIONS):
            middle = (low + up) / 2
            low, up = (middle, up) if spend(middle, trust).fraction > wanted else (low, middle)
        return spend(up, trust)

    cheapest = spend(HIGHEST, 1.0).fraction
    rows = [spend(0.0, 1.0)]
    while rows[-1].fraction > cheapest:
        wanted = max(rows[-1].fraction - STEP, cheapest)
        rows.append(_better([solve(wanted, rows[-1].trade_off, trust) for trust in trusts]))
    return tuple(rows)


def _better(rows: Sequence[Budget]) -> Budget:
    """Return the row of least distortion; a later one only if it is better by more than chance would make it."""
    best = rows[0]
    for row in rows[1:]:
        if row.distortion < (1 - MARGIN) * best.distortion - LEAST_GAIN:
            best = row
    return best
