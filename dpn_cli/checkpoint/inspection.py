"""What is in a checkpoint and what its routes cost, from config and headers alone. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpn_cli.checkpoint.headers import BITS, Checkpoint
from dpn_cli.checkpoint.layout import IMAGE_SIZE, TEXT_TOKENS, LlavaLayout, open_llava, read_pyramid
from dpn_cli.checkpoint.processor import inspect_processor
from dpn_cli.checkpoint.quantisation import num_parameters
from dpn_cli.errors import UsageError
from dpn_cli.pyramid.config import DPE_PARTS, PyramidConfig, Route
from dpn_cli.pyramid.cost import flops_fraction, tokens_per_layer
from dpn_cli.pyramid.experts import Grid, num_tokens
from dpn_cli.pyramid.reach import typical_length
from dpn_cli.pyramid.route import format_route, parse_route


@dataclass(frozen=True)
class Part:
    """A part of the model: its parameters and their bytes on disk."""

    name: str
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer in the prefill of one sample."""

    visual_tokens: int
    flops: int
    kv_bytes: int


@dataclass(frozen=True)
class RouteCost:
    """A route and what it costs.

    Attributes:
        name: the route by its experts' names, or what it is called.
        route: the route.
        fraction: fraction of the original decoder's FLOPs, routers included.
        layers: the cost of every layer.
        is_example: whether it is only one of the routes that are offered, neither at an end nor asked for.
    """

    name: str
    route: Route
    fraction: float
    layers: tuple[LayerCost, ...]
    is_example: bool


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found.

    Attributes:
        path: the checkpoint folder.
        config: Contents of its config.json.
        layout: the decoder's layout.
        pyramid: the pyramid; without sites if the model is not converted.
        parts: the parts of the model, with their parameters.
        grids: visual tokens of the sample that `routes` were computed for.
        text_tokens: text tokens of that sample.
        sample_from: what that sample comes from: the caller's `options`, at least in part; the `calibration`, of whose
            data it is typical; or neither (`default`).
        routes: the full route, each uniform one, the cheapest, and those that were asked for.
        notes: Notes for the user on the processor.
    """

    path: Path
    config: dict[str, Any]
    layout: LlavaLayout
    pyramid: PyramidConfig
    parts: tuple[Part, ...]
    grids: tuple[Grid, ...]
    text_tokens: int
    sample_from: Literal["options", "calibration", "default"]
    routes: tuple[RouteCost, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "checkpoint": str(self.path),
            "model_type": self.config["model_type"],
            "base_model": self.config.get("base_model"),
            "decoder": {"model_type": self.layout.text_config["model_type"], **vars(self.layout.shape)},
            "parts": [vars(part) for part in self.parts],
            "pyramid": self.pyramid.to_dict() if self.pyramid.sites else None,
            "sample": {"grids": self.grids, "text_tokens": self.text_tokens},
            "sample_from": self.sample_from,
            "routes": [
                {
                    "name": cost.name,
                    "route": cost.route,
                    "flops_fraction": cost.fraction,
                    "flops": sum(layer.flops for layer in cost.layers),
                    "kv_bytes": sum(layer.kv_bytes for layer in cost.layers),
                    "layers": [vars(layer) for layer in cost.layers],
                }
                for cost in self.routes
            ],
        }


def inspect_checkpoint(
    folder: Path,
    text_tokens: int | None = None,
    images: int | None = None,
    image_size: tuple[int, int] | None = None,
    asked: Sequence[str] = (),
) -> Inspection:
    """Read a LLaVA, converted or not.

    Args:
        folder: the checkpoint.
        text_tokens: text tokens of the sample whose cost is shown; None for those that are typical of the calibration
            data, or 64 where they are not known.
        images: images of that sample; None for those that are typical, or for one if `image_size` is given or nothing
            is known.
        image_size: Height and width of the images in pixels, which matter only if images are cut into tiles.
        asked: more routes, as `parse_route` reads them.

    Raises:
        CheckpointError: if it is missing, damaged, or no LLaVA, or its processor belongs to another model.
        UsageError: if the sample does not fit the model's positions, or a route not the pyramid.
    """
    checkpoint, layout = open_llava(folder)
    lacking = inspect_processor(checkpoint, layout).summary()
    pyramid = read_pyramid(checkpoint, layout)
    typical = typical_length(pyramid)
    default = layout.image_grids([IMAGE_SIZE]), TEXT_TOKENS
    grids, usual = typical or default
    if images is not None or image_size is not None:
        grids = layout.image_grids([image_size or IMAGE_SIZE] * (1 if images is None else images))
    is_chosen = (text_tokens, images, image_size) != (None, None, None)
    text_tokens = usual if text_tokens is None else text_tokens
    _check_length(layout, grids, text_tokens)
    routes = {"full": pyramid.full_route}
    examples = _examples(pyramid, grids)
    routes |= examples

    def cost(name: str, route: Route) -> RouteCost:
        fraction = flops_fraction(layout.shape, pyramid, route, grids, text_tokens)
        layers = _layers(checkpoint, layout, pyramid, route, grids, text_tokens)
        return RouteCost(name, route, fraction, layers, name in examples and name not in asked)

    if pyramid.sites:
        routes["cheapest"] = min(
            pyramid.routes_for(grids),
            key=lambda route: flops_fraction(layout.shape, pyramid, route, grids, text_tokens),
        )
    routes |= {name: _asked(name, pyramid, grids) for name in asked}
    return Inspection(
        path=folder,
        config=checkpoint.config,
        layout=layout,
        pyramid=pyramid,
        parts=tuple(parts(checkpoint, layout)),
        grids=grids,
        text_tokens=text_tokens,
        sample_from="options" if is_chosen else "default" if typical is None else "calibration",
        routes=tuple(cost(name, route) for name, route in routes.items()),
        notes=(f"Missing, and completed by dpn wherever it is used: {lacking}.",) if lacking else (),
    )


def _check_length(layout: LlavaLayout, grids: tuple[Grid, ...], text_tokens: int) -> None:
    tokens = text_tokens + num_tokens(grids)
    limit = layout.text_config.get("max_position_embeddings")
    if limit is not None and tokens > limit:
        raise UsageError(f"a sample of {tokens} tokens does not fit the model's {limit} positions")


def _asked(text: str, pyramid: PyramidConfig, grids: tuple[Grid, ...]) -> Route:
    route = parse_route(text, pyramid.sites)
    try:
        pyramid.walk(route, grids)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return route


def _examples(pyramid: PyramidConfig, grids: tuple[Grid, ...]) -> dict[str, Route]:
    """Return the routes that are offered, where they are listed, else some that show every expert; by their names."""
    if pyramid.routes is not None:
        return {format_route(route, pyramid.sites): route for route in list(pyramid.routes_for(grids))[1:]}
    most = max((len(site.experts) for site in pyramid.sites), default=0)
    uniform = dict.fromkeys(_uniform(pyramid, k, grids) for k in range(1, most))
    return {format_route(route, pyramid.sites): route for route in uniform if any(route)}


def _uniform(pyramid: PyramidConfig, expert: int, grids: tuple[Grid, ...]) -> Route:
    """Return the route that takes `expert` at every site, or the next lower one that is offered there."""
    route: Route = ()
    stage = grids
    for i, site in enumerate(pyramid.sites):
        chosen = max(k for k in pyramid.offered(i, stage) if k <= expert)
        stage = site.experts[chosen].left(stage, pyramid.rounding)
        route = (*route, chosen)
    return route


def _layers(
    checkpoint: Checkpoint,
    layout: LlavaLayout,
    pyramid: PyramidConfig,
    route: Route,
    grids: tuple[Grid, ...],
    text_tokens: int,
) -> tuple[LayerCost, ...]:
    embedding = checkpoint.tensors[f"{layout.text_prefix}embed_tokens.weight"]
    value_bytes = BITS[embedding.dtype] // 8  # the cache is kept in the dtype that the model computes in
    tokens = tokens_per_layer(layout.shape, pyramid, route, grids, text_tokens)
    return tuple(
        LayerCost(n - text_tokens, layout.shape.layer_flops(n), layout.shape.kv_bytes(n, value_bytes)) for n in tokens
    )


def parts(checkpoint: Checkpoint, layout: LlavaLayout) -> list[Part]:
    """Count parameters and bytes of a model, part by part."""
    totals: dict[str, list[int]] = {}
    for name, tensor in checkpoint.tensors.items():
        total = totals.setdefault(_part(name, layout), [0, 0])
        total[0] += num_parameters(tensor)
        total[1] += tensor.nbytes
    return [Part(name, parameters, nbytes) for name, (parameters, nbytes) in sorted(totals.items())]


def _part(name: str, layout: LlavaLayout) -> str:
    for part in ("vision_tower", "multi_modal_projector", "image_newline", "lm_head"):
        if part in name.split("."):
            return part
    inside = name.removeprefix(layout.text_prefix)
    if inside == name:
        return "other"
    return "pyramid" if inside.startswith(DPE_PARTS) else "language_model"
