"""Routes as users write and read them, everywhere: the experts of all sites, as in `keep,pool:1x2,exit`. No torch."""

from dpn_cli.errors import RouteError, did_you_mean
from dpn_cli.pyramid.config import Route, Site
from dpn_cli.pyramid.experts import Expert


def format_route(route: Route, sites: tuple[Site, ...]) -> str:
    """Return the names of a route's experts; `parse_route` reads them back."""
    return ",".join(str(site.experts[k]) for site, k in zip(sites, route, strict=True))


def parse_route(text: str, sites: tuple[Site, ...]) -> Route:
    """Read a route: one expert (`keep,1x2,exit`) or its index (`0,1,2`) per site.

    Raises:
        RouteError: if it does not fit the sites.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != len(sites):
        raise RouteError(
            f"the route {text!r}: expected {len(sites)} experts, one for each site of this pyramid, such as "
            f"{','.join(str(site.experts[0]) for site in sites)}, found {len(parts)}"
        )
    return tuple(_expert(part, i, site.experts) for i, (part, site) in enumerate(zip(parts, sites, strict=True)))


def _expert(part: str, site: int, experts: tuple[Expert, ...]) -> int:
    if part.isdecimal() and int(part) < len(experts):
        return int(part)
    try:
        return experts.index(Expert.parse(part))
    except ValueError:
        names = list(map(str, experts))
        raise RouteError(
            f"{part!r} is not an expert of site {site}: expected one of {', '.join(names)}, or 0 to {len(experts) - 1}."
            f"{did_you_mean(part, names)}"
        ) from None
