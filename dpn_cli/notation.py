"""How figures are written, in tables and pages alike."""

from collections.abc import Sequence

SMALLEST_SHOWN = 1e-4
NAMED = 5  # of many


def nats(value: float) -> str:
    """Return a KL: never a zero that it is not."""
    return f"<{SMALLEST_SHOWN:g}" if 0 < value < SMALLEST_SHOWN else f"{value:.4f}"


def some(names: Sequence[str]) -> str:
    """Return the first of some names, and how many there are besides."""
    more = len(names) - NAMED
    return f"{', '.join(names[:NAMED])}{f' and {more} more' if more > 0 else ''}"


def percent(value: float) -> str:
    """Return a share."""
    return f"{value:.1%}"


def counted(count: int, noun: str) -> str:
    """Return a number of things, such as `1 file` or `2 files`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
