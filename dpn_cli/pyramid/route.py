"""Routes as users write them. No torch."""

import re

from dpn_cli.errors import UsageError
from dpn_cli.pyramid.config import Rate, Route, Site

_RATE = re.compile(r"(\d+)[x×](\d+)")


def parse_route(text: str, sites: tuple[Site, ...]) -> Route:
    """Read a route: one expert index (`0,1,2`) or rate (`1x1,1x2,2x2`) per site.

    Raises:
        UsageError: if it does not fit the sites.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != len(sites):
        raise UsageError(
            f"the route {text!r} has {len(parts)} entries, the pyramid has {len(sites)} sites: expected a rate for "
            "each, such as 1x1,1x2,2x2 (or 0,1,2)"
        )
    return tuple(_expert(part, i, site.rates) for i, (part, site) in enumerate(zip(parts, sites, strict=True)))


def _expert(part: str, site: int, rates: tuple[Rate, ...]) -> int:
    rate = _RATE.fullmatch(part)
    if rate and (int(rate[1]), int(rate[2])) in rates:
        return rates.index((int(rate[1]), int(rate[2])))
    if part.isdecimal() and int(part) < len(rates):
        return int(part)
    offered = ", ".join(f"{height}x{width}" for height, width in rates)
    raise UsageError(f"{part!r} is no rate of site {site}: expected one of {offered}, or 0 to {len(rates) - 1}")
