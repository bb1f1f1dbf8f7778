"""`dpn inspect`: what is in a checkpoint, and what its routes cost."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpn_cli import console
from dpn_cli.checkpoint.layout import TEXT_TOKENS
from dpn_cli.commands.numbers import WholeNumber
from dpn_cli.commands.options import Size, checkpoint_folder, model_option, wide_option
from dpn_cli.commands.tables.columns import MEANINGS, meaning, some_budgets
from dpn_cli.commands.tables.experts import show_sites
from dpn_cli.errors import UsageError
from dpn_cli.limits import MAX_ROW_IMAGES
from dpn_cli.notation import nats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dpn_cli.checkpoint.inspection import Inspection, RouteCost
    from dpn_cli.pyramid.config import PyramidConfig

SAMPLE_FROM = {
    "options": "",
    "calibration": ", typical of the calibration data",
    "default": ", an assumed length (--text-tokens sets it)",
}


@click.command("inspect")
@click.argument("name", metavar="[MODEL]", required=False)
@model_option
@click.option(
    "--text-tokens", type=WholeNumber(1),
    help=f"Text tokens of a sample; default: typical of the calibration data, else {TEXT_TOKENS}.",
)  # fmt: skip
@click.option(
    "--images",
    type=WholeNumber(0, MAX_ROW_IMAGES),
    help="Images of a sample; default: typical of the calibration data, else 1.",
)
@click.option(
    "--image-size", type=Size(),
    help="Height and width of the images, for models that cut them into tiles; default: typical of the calibration "
    "data, else 672x672.",
)  # fmt: skip
@click.option(
    "--route", "routes", multiple=True, metavar="ROUTE",
    help="Also show this route: one expert per site, such as keep,keep,2x2,keep,exit; repeatable.",
)  # fmt: skip
@wide_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    name: str | None,
    model: Path | None,
    text_tokens: int | None,
    images: int | None,
    image_size: tuple[int, int] | None,
    routes: tuple[str, ...],
    wide: bool,
    as_json: bool,
) -> None:
    """Show sites, experts and budgets, and tokens, FLOPs and KV cache per layer, without loading the model.

    MODEL is anything that `dpn convert` accepts, converted or not.
    """
    from dpn_cli.checkpoint.inspection import inspect_checkpoint
    from dpn_cli.checkpoint.source import resolve_source

    if name and model:
        raise UsageError("give MODEL or --model, not both")
    folder = resolve_source(name).path if name else checkpoint_folder(model)
    found = inspect_checkpoint(folder, text_tokens, images, image_size, routes)
    for note in found.notes:
        console.note(note)
    if as_json:
        console.print_json(found.to_dict())
    else:
        _show(found, wide)


def _show(found: "Inspection", wide: bool) -> None:
    from dpn_cli.checkpoint.source import resolve_source

    console.table(
        f"{resolve_source(str(found.path)).label} ({found.config['model_type']})",
        ["part", "parameters", "MB"],
        [(part.name, f"{part.parameters:,}", f"{part.nbytes / 1e6:,.2f}") for part in found.parts],
    )
    _show_pyramid(found.pyramid, wide)
    images = " + ".join(f"{height}×{width}" for height, width in found.grids) or "no"
    sample = f"{images} visual and {found.text_tokens} text tokens{SAMPLE_FROM[found.sample_from]}"
    routes = sorted(found.routes, key=lambda cost: -cost.fraction)
    console.table(
        f"Routes, and what the prefill of a sample costs on each: {sample}",
        ["route", "FLOPs", "GFLOPs", "KV MB"],
        [_summary(cost) for cost in routes],
        legend=f"A route is one expert per site. {meaning('FLOPs')}; KV: the cache of keys and values.",
    )
    segments = [each for each in found.pyramid.segments(found.layout.shape.num_layers) if each]
    console.table(
        "Visual tokens · GFLOPs · KV MB of every layer" if wide else "Visual tokens in the layers",
        ["route", *(f"{each.start}" if len(each) == 1 else f"{each.start}–{each.stop - 1}" for each in segments)],
        [_layer_row(cost, segments, wide) for cost in routes if wide or not cost.is_example],
        legend="Column heads are layers, counted from 0." + ("" if wide else " --wide shows all routes and figures."),
    )


def _show_pyramid(pyramid: "PyramidConfig", wide: bool) -> None:
    from dpn_cli.pyramid.route import format_route

    route, explained = pyramid.static_route, ""
    if route is not None:
        state = f"static route {format_route(route, pyramid.sites)}"
    elif pyramid.budgets or pyramid.is_imported:
        state, explained = f"routed, λ {pyramid.trade_off:.4g}", f"{meaning('λ')}."
    else:
        state = "not calibrated, so every sample keeps all its tokens (dpn calibrate --data DATA changes that)"
    if pyramid.sites:
        show_sites(f"Pyramid: {state}", pyramid.sites, explained, is_fixed=route is not None)
    if pyramid.budgets:
        budgets = some_budgets(pyramid.budgets, wide)
        console.table(
            f"Budgets, {len(budgets)} of {len(pyramid.budgets)} that were measured; any other can be requested",
            ["budget", "λ", "KL"],
            [(f"{b.fraction:.3f}", f"{b.trade_off:.4g}", nats(b.distortion)) for b in budgets],
            legend=f"budget: mean {MEANINGS['FLOPs']}; {meaning('KL')}."
            + ("" if wide else " --wide shows all budgets."),
        )


def _summary(cost: "RouteCost") -> tuple[str, ...]:
    flops = sum(layer.flops for layer in cost.layers)
    kv_bytes = sum(layer.kv_bytes for layer in cost.layers)
    return cost.name, f"{cost.fraction:.3f}", f"{flops / 1e9:,.3g}", f"{kv_bytes / 1e6:,.3g}"


def _layer_row(cost: "RouteCost", segments: "Sequence[range]", wide: bool) -> list[str]:
    """Return one cell per segment: all layers between two sites cost the same."""
    layers = [cost.layers[segment.start] for segment in segments]
    tokens = [f"{layer.visual_tokens}" for layer in layers]
    costs = [f" · {layer.flops / 1e9:.3g} · {layer.kv_bytes / 1e6:.3g}" if wide else "" for layer in layers]
    return [cost.name, *map("".join, zip(tokens, costs, strict=True))]
