"""From routers to the budget table: which λ spends how much, and what it costs in fidelity."""

import torch
from torch import nn

from dpn_cli.calibration.policy import Policy, outcome
from dpn_cli.calibration.rollout import RouteTable
from dpn_cli.pyramid.config import Budget

STEP = 0.02  # between the rows of the table, in fractions of the full prefill
HIGHEST = 1e6  # λ, in nats per whole prefill: beyond any distortion
BISECTIONS = 60


def budget_table(routers: nn.ModuleList, table: RouteTable) -> tuple[Budget, ...]:
    """Solve λ for budgets from 1.0 to the cheapest, so that each is met in the mean over a table.

    Args:
        routers: fitted.
        table: samples that the routers were not fitted to.

    Returns:
        Rows of falling fraction and rising λ, the cheapest reachable one last.
    """
    with torch.no_grad():
        policy = Policy.of(routers, table)

    def spend(trade_off: float) -> Budget:
        taken = outcome(table, policy.choose(trade_off))
        return Budget(taken.fraction, trade_off, taken.distortion)

    def solve(wanted: float, low: float) -> Budget:
        """Return the row of the smallest λ from `low` on that spends no more than wanted."""
        up = HIGHEST
        for _ in range(BISECTIONS):
            middle = (low + up) / 2
            low, up = (middle, up) if spend(middle).fraction > wanted else (low, middle)
        return spend(up)

    cheapest = spend(HIGHEST).fraction
    rows = [spend(0.0)]
    while rows[-1].fraction > cheapest:
        rows.append(solve(max(rows[-1].fraction - STEP, cheapest), rows[-1].trade_off))
    return tuple(rows)
