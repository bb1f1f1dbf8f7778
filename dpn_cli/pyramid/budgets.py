"""The budget table that calibration measures: which λ spends which share of the prefill. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

BUDGET_STEP = 0.02  # between the rows of a table, in fractions of the full prefill, where routes allow it


@dataclass(frozen=True)
class Budget:
    """One row of a budget table; the next one has a larger λ and spends less.

    Attributes:
        fraction: mean fraction of the original LLM's prefill FLOPs, over the held-out calibration samples.
        trade_off: the λ that reaches it.
        distortion: mean KL divergence from the teacher, in nats, at that λ.
        trust: how far the routers' predictions count at that λ, from 0, where every sample takes what is best in the
            mean, to 1; see `trust_at`.
    """

    fraction: float
    trade_off: float
    distortion: float
    trust: float = 1.0


_NO_LIMIT = Budget(1.0, 0.0, 0.0)


def fraction_at(table: Sequence[Budget], trade_off: float) -> float:
    """Return the budget that λ stands for."""
    above = _NO_LIMIT
    for row in table:
        if row.trade_off == trade_off:
            return row.fraction
        if row.trade_off > trade_off:
            share = (trade_off - above.trade_off) / (row.trade_off - above.trade_off)
            return round(above.fraction - share * _interpolated(above, row), 6)
        above = row
    return above.fraction


def trust_at(table: Sequence[Budget], trade_off: float) -> float:
    """Return how far the routers' predictions count at λ: see `Budget.trust`."""
    return next((row.trust for row in table if row.trade_off >= trade_off), 1.0)


def trade_off_at(table: Sequence[Budget], budget: float) -> float:
    """Return the λ that spends a budget on average; where no λ does, the one that spends less.

    Raises:
        ValueError: if the budget is below the cheapest row.
    """
    above = _NO_LIMIT
    for row in table:
        if row.fraction <= budget:
            share = (above.fraction - budget) / max(_interpolated(above, row), 1e-12)
            if share >= 1 or row.trust != above.trust:  # between two rules there is nothing to interpolate
                return row.trade_off
            return above.trade_off + share * (row.trade_off - above.trade_off)
        above = row
    raise ValueError(f"budget {budget} is out of reach: this pyramid's cheapest is {above.fraction:.3f}")


def _interpolated(above: Budget, row: Budget) -> float:
    """Return how far below a row λ may be interpolated, in fractions of the full prefill.

    The next row has the smallest λ that spends a step less. Where it spends less than that, smaller ones spend more.
    """
    return min(above.fraction - row.fraction, BUDGET_STEP)
