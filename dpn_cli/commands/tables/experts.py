"""The experts in a table: a pyramid's sites, and what experts and routes are."""

from collections.abc import Iterable, Sequence

from dpn_cli import console
from dpn_cli.pyramid.config import Site
from dpn_cli.pyramid.experts import KINDS, Expert

SETTINGS = {
    "cells": "1x2 is a cell of one row and two columns.",
    "share": "A number is the share of the tokens that stay.",
    "share+cells": "With +8x8, the other tokens of every cell of 8×8 are merged into one.",
}
"""What the settings of experts mean, by the forms that they may take."""


def show_sites(title: str, sites: Sequence[Site], more: str = "", is_fixed: bool = False) -> None:
    """Print the sites of a pyramid with their experts, and what these words and all of the experts mean.

    Args:
        title: Title of the table.
        sites: Sites in the order of the layers.
        more: Further sentences of the legend.
        is_fixed: Whether all samples take one route.
    """
    who = "the one on the route, the same for every sample" if is_fixed else "which a router picks for every sample"
    legend = f"A site is where visual tokens are reduced: by one of its experts, {who}."
    about = about_experts(expert for site in sites for expert in site.experts)
    rows = [(str(site), ", ".join(map(str, site.experts))) for site in sites]
    console.table(title, ["site", "experts"], rows, ["experts"], " ".join(filter(None, [legend, about, more])))


def about_experts(experts: Iterable[Expert]) -> str:
    """Return in sentences what experts do, and what their settings mean."""
    experts = list(experts)
    kinds = dict.fromkeys(expert.kind for expert in experts)
    forms = {"share" for each in experts if each.share}
    forms |= {"share+cells" if each.share else "cells" for each in experts if each.cells}
    return " ".join(
        [
            f"Experts: {'; '.join(f'{kind} ({KINDS[kind].about})' for kind in kinds)}.",
            *(sentence for form, sentence in SETTINGS.items() if form in forms),
        ]
    )


def about_routes(routes: Iterable[str]) -> str:
    """Return in sentences what a route is, and what the experts of these do."""
    names = dict.fromkeys(name for route in routes for name in route.split(","))
    return f"A route is one expert per site, in the order of the layers. {about_experts(map(Expert.parse, names))}"
