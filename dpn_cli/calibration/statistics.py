"""Intervals for the figures that are reported."""

import math

Z_95 = 1.959964


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a proportion (Wilson 1927).

    Args:
        successes: how many of `count`; a sum of per-sample shares is allowed.
        count: independent trials, at least one.
    """
    p, z2 = successes / count, Z_95**2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)
