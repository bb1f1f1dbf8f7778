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
TRUSTS = (1.0, 0.75, 0.5, 0.25, 0.0)  # in the predictions of routers, those that are tried


def budget_table(
    routers: nn.ModuleList, table: RouteTable, mean_distortions: Sequence[float] = ()
) -> tuple[Budget, ...]:
    """Solve λ for budgets from 1.0 to the cheapest, so that each is met in the mean over a table.

    A row trusts the routers' predictions as far as it pays on the table: not at all, where one route for all samples
    is as good.

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
        found = [solve(wanted, rows[-1].trade_off, trust) for trust in trusts]
        rows.append(min(found, key=lambda row: (row.distortion, row.fraction)))
    return tuple(rows)
