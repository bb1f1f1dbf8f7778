"""From routers to the budget table: which λ spends how much, and what it costs in fidelity."""

from collections.abc import Sequence

import torch
from torch import nn

from dpn_cli.calibration.policy import Policy, outcome
from dpn_cli.calibration.rollout import RouteTable
from dpn_cli.inference.threads import one_thread
from dpn_cli.pyramid.budgets import BUDGET_STEP, Budget

HIGHEST = 1e6  # λ, the loss that a whole prefill is worth: beyond any
PRECISION = 1e-7  # of λ, relative: what it is multiplied by has no more
LEAST_GAIN = 0.002  # of the loss: less is not worth another rule
CONFIDENCE = 1.64  # standard errors: 95%, one-sided
TRUSTS = (1.0, 0.75, 0.5, 0.25, 0.0)  # in the predictions of routers, those that are tried


@one_thread()
def budget_table(routers: nn.ModuleList, table: RouteTable, mean_losses: Sequence[float] = ()) -> tuple[Budget, ...]:
    """Solve λ for budgets from 1.0 to the cheapest, so that each is met in the mean over a table.

    A row trusts the routers' predictions less only where that is clearly better on the table, down to not at all, where
    all samples take one route.

    Args:
        routers: Fitted routers.
        table: samples that the routers were not fitted to.
        mean_losses: Mean loss of each route, to which predictions are shrunk; empty to trust them fully.

    Returns:
        Rows of falling fraction and rising λ, the cheapest reachable one last.
    """
    with torch.no_grad():
        policy = Policy.of(routers, table)
    trusts = TRUSTS if mean_losses else (1.0,)

    choosers = {trust: policy.chooser(trust, mean_losses) for trust in trusts}
    samples, loss = torch.arange(len(table.distortion)), table.loss.distortion

    def solve(wanted: float, low: float, trust: float) -> tuple[float, float]:
        """Return the smallest λ from `low` on that spends no more than wanted, and the trust."""
        up, take = HIGHEST, choosers[trust]
        while up - low > PRECISION * up:
            middle = (low + up) / 2
            spent = table.fraction[samples, take(middle)].double().mean().item()
            low, up = (middle, up) if spent > wanted else (low, middle)
        return up, trust

    def row(trade_off: float, trust: float) -> Budget:
        found = outcome(table, choosers[trust](trade_off))
        return Budget(found.fraction, trade_off, found.distortion, trust)

    cheapest = row(HIGHEST, 1.0).fraction
    rows = [row(0.0, 1.0)]
    while rows[-1].fraction > cheapest:
        wanted = max(rows[-1].fraction - BUDGET_STEP, cheapest)
        settings = [solve(wanted, rows[-1].trade_off, trust) for trust in trusts]
        losses = [loss[samples, choosers[trust](trade_off)] for trade_off, trust in settings]
        rows.append(row(*settings[_best(losses)]))
    return tuple(rows)


def _best(losses: Sequence[torch.Tensor]) -> int:
    """Return the index of the least mean; a later one only if it is lower by more than chance would make it.

    Args:
        losses: [N] those of the same samples under every setting.
    """
    best = 0
    for i, each in enumerate(losses):
        gain = losses[best] - each
        if gain.mean() > max(LEAST_GAIN, CONFIDENCE * gain.std() / len(gain) ** 0.5):
            best = i
    return best
