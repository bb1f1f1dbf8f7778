"""Intervals and tests for the figures that are reported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959964
RESAMPLES = 2000
_DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values with its 95% percentile bootstrap interval (Efron 1979).

    For a paired comparison the values are the differences, sample by sample.

    Args:
        values: the values, at least one.
    """
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    rows = max(1, _DRAWN_AT_ONCE // len(data))
    means = [
        data[rng.integers(len(data), size=(min(rows, RESAMPLES - start), len(data)))].mean(1)
        for start in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()
    return Estimate(float(data.mean()), low, high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the two-sided p-value of the exact McNemar test: are two raters equally often right?

    Args:
        first: whether the first rater is right, per sample.
        second: whether the second rater is right, per sample.

    Source: McNemar 1947, with the binomial distribution in place of χ².
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    count = only_first + only_second
    tail = sum(math.comb(count, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**count)


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a proportion (Wilson 1927).

    Args:
        successes: number of successes; a sum of per-sample shares is allowed.
        count: number of independent trials, at least one.
    """
    p, z2 = successes / count, Z_95**2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)
