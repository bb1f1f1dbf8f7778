"""Budgets that were asked for, beside what the data have spent. No torch."""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpn_cli.pyramid.config import PyramidConfig

if TYPE_CHECKING:
    from dpn_cli.data.options import DataOptions

OVERSPENT, UNDERSPENT = 0.02, 0.05  # of a FLOPs fraction: from here on the budget was not met


@dataclass(frozen=True)
class Spending:
    """A budget and what came of it.

    Attributes:
        asked: the budget: a mean fraction of the prefill FLOPs.
        spent: the mean fraction that the samples spent.
        samples: number of samples.
    """

    asked: float
    spent: float
    samples: int

    @property
    def is_met(self) -> bool:
        """Whether the samples spent about what was asked for.

        Without a limit there is nothing to meet, and one sample may well spend less than the mean.
        """
        least = 0.0 if self.samples == 1 else self.asked - UNDERSPENT
        return self.asked >= 1 or least <= self.spent <= self.asked + OVERSPENT

    def to_dict(self) -> dict[str, float]:
        """Return plain data for JSON."""
        return asdict(self)


def unmet(
    spendings: Iterable[Spending], pyramid: PyramidConfig, model: Path, data: "DataOptions | None"
) -> Iterator[str]:
    """Say which budgets the data did not meet, and the command that solves λ on them.

    Args:
        spendings: Budgets that were asked for, and what was spent.
        pyramid: the checkpoint's pyramid.
        model: the checkpoint's folder.
        data: the data that the samples are from; None if it is not a data set.
    """
    missed = [each for each in spendings if not each.is_met and not _saves(each, pyramid)]
    for each in missed:
        if each.samples == 1:
            yield f"This sample spent {each.spent:.3f} of the prefill FLOPs; budget {each.asked:g} is a mean over many."
        else:
            yield f"Budget {each.asked:g} was not met: these {each.samples} samples spent {each.spent:.3f} on average."
    if missed:
        record = pyramid.calibration
        solved_on = record.get("budgets_solved_on", record).get("data", "other data")
        if data and solved_on == data.name:
            yield f"Its λ was solved on {data.name} as a whole; the mean over some of its samples varies."
            return
        named = ["--model", str(model), *(data.arguments() if data else ("--data", "DATA"))]
        yield (
            f"Its λ was solved on {solved_on}. To solve it on {'yours' if data is None else 'these data'}: "
            f"dpn calibrate {shlex.join(named)} --budgets-only"
        )


def _saves(spending: Spending, pyramid: PyramidConfig) -> bool:
    """Say whether less was spent because no route that costs more is better: the budget table has a gap there."""
    below = next((row.fraction for row in pyramid.budgets if row.fraction <= spending.asked), None)
    return below is not None and below - UNDERSPENT <= spending.spent <= spending.asked
