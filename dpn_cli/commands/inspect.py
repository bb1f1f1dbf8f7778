"""`dpn inspect`: what is in a checkpoint, and what its routes cost."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpn_cli import console
from dpn_cli.checkpoint.layout import TEXT_TOKENS
from dpn_cli.commands.options import Size, checkpoint_folder, model_option
from dpn_cli.errors import UsageError

if TYPE_CHECKING:
    from dpn_cli.checkpoint.inspection import Inspection, RouteCost


SAMPLE_FROM = {
    "options": "",
    "calibration": ", typical of the calibration data",
    "default": ", an assumed length (--text-tokens sets it)",
}


@click.command("inspect")
@click.argument("name", metavar="[MODEL]", required=False)
@model_option
@click.option(
    "--text-tokens", type=click.IntRange(1),
    help=f"Text tokens of a sample; default: typical of the calibration data, else {TEXT_TOKENS}.",
)  # fmt: skip
@click.option(
    "--images",
    type=click.IntRange(0),
    help="Images of a sample; default: typical of the calibration data, else 1.",
)
@click.option(
    "--image-size", type=Size(),
    help="Height and width of the images, for models that cut them into tiles; default: typical of the calibration "
    "data, else 672x672.",
)  # fmt: skip
@click.option(
    "--route", "routes", multiple=True, metavar="ROUTE",
    help="Show this route too, such as 1x1,1x2,2x2 (or 0,1,2); repeatable.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    name: str | None,
    model: Path | None,
    text_tokens: int | None,
    images: int | None,
    image_size: tuple[int, int] | None,
    routes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show sites, rates and budgets, and tokens, FLOPs and KV bytes per layer, without loading the model.

    MODEL is anything that `dpn convert` takes, converted or not.
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
        console.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _show(found)


def _show(found: "Inspection") -> None:
    from dpn_cli.checkpoint.source import resolve_source
    from dpn_cli.pyramid.route import format_route

    console.table(
        f"{resolve_source(str(found.path)).label} ({found.config['model_type']})",
        ["part", "parameters", "MB"],
        [(part.name, f"{part.parameters:,}", f"{part.nbytes / 1e6:,.2f}") for part in found.parts],
    )
    pyramid, route = found.pyramid, found.pyramid.static_route
    if pyramid.sites:
        console.table(
            f"Pyramid: λ {pyramid.trade_off:g}, "
            + ("routed" if route is None else f"static route {format_route(route, pyramid.sites)}"),
            ["site", "experts"],
            [(str(site), ", ".join(map(str, site.experts))) for site in pyramid.sites],
        )
    if pyramid.budgets:
        console.table(
            "Budgets (measured by calibration)",
            ["FLOPs fraction", "λ", "KL, nats"],
            [(f"{b.fraction:.3f}", f"{b.trade_off:.4g}", f"{b.distortion:.4g}") for b in pyramid.budgets],
        )
    images = " + ".join(f"{height}×{width}" for height, width in found.grids) or "no"
    console.table(
        f"Prefill of {images} visual and {found.text_tokens} text tokens{SAMPLE_FROM[found.sample_from]}",
        ["route", "experts", "FLOPs fraction", "GFLOPs", "KV cache, MB"],
        [_summary(cost) for cost in found.routes],
    )
    console.table(
        "Every layer: visual tokens · GFLOPs · KV MB",
        ["layers", *(cost.name for cost in found.routes)],
        _layer_rows(found),
    )


def _summary(cost: "RouteCost") -> tuple[str, ...]:
    flops = sum(layer.flops for layer in cost.layers)
    kv_bytes = sum(layer.kv_bytes for layer in cost.layers)
    experts = " ".join(map(str, cost.route))
    return cost.name, experts, f"{cost.fraction:.3f}", f"{flops / 1e9:,.3g}", f"{kv_bytes / 1e6:,.3g}"


def _layer_rows(found: "Inspection") -> list[list[str]]:
    """Return one row per segment: all layers between two sites cost the same."""
    rows = []
    for segment in found.pyramid.segments(found.layout.shape.num_layers):
        label = f"{segment.start}" if len(segment) == 1 else f"{segment.start}–{segment.stop - 1}"
        layers = [cost.layers[segment.start] for cost in found.routes]
        cells = [f"{x.visual_tokens} · {x.flops / 1e9:.3g} · {x.kv_bytes / 1e6:.3g}" for x in layers]
        rows.append([label, *cells])
    return rows
