"""Checkpoints of the authors of DPN: LLaVA in the original layout, with a pyramid under `pooling` in config.json.

Their evaluation is kept: pooled tokens are scaled by the chosen probability, positions start anew in every layer,
incomplete cells are dropped, and a sample of fewer than 16 visual tokens is left alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_cli.conversion.original import rewrite_original
from dpn_cli.conversion.rewriting import Planned, Rewritten
from dpn_cli.conversion.weights import Weights
from dpn_cli.errors import CheckpointError
from dpn_cli.families.tensors import TEXT_PREFIXES
from dpn_cli.pyramid.config import IMPORTED_KEY, IMPORTED_USE, PyramidConfig, RouterConfig, Site
from dpn_cli.pyramid.experts import Rate, pool

if TYPE_CHECKING:
    import torch

ROUTER_TOKEN = "<ROUTER>"
MIN_TOKENS = 16  # what has fewer is not pooled

_ROUTER = {
    "v1": {"norm.weight": "mlp1.0.weight", "norm.bias": "mlp1.0.bias", "hidden.weight": "mlp1.1.weight",
           "head.weight": "predictor.weight"},
    "v2": {"head.weight": "predictor.weight"},
}  # fmt: skip
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "pooling_type": ("adaptive", "static"),
    "pooling_function": ("max", "avg", "conv"),
    "pooling_location": ("post", "pre"),
    "router_version": ("v1", "v2"),
    "prepooling": (False, True),
    "use_special_token": (False, True),
}
# What their code takes for a key that is missing.
_DEFAULTS = {"pooling_function": "max", "pooling_location": "post", "router_version": "v1", "prepooling": False}


def import_authors(config: dict[str, Any], weights: Weights, vision_tower: str | None = None) -> Rewritten:
    """Take a checkpoint of the authors.

    Args:
        config: the checkpoint's config.json, which `validate_original` has accepted.
        weights: the checkpoint's tensors.
        vision_tower: folder or hub id of the CLIP model; by default the one that config.json names.

    Raises:
        CheckpointError: if it is damaged or incomplete.
        MissingExtraError: if its tokenizer needs packages that are not installed.
    """
    folder = weights.folder
    if isinstance(config["pooling"], dict) and config["pooling"].get("pooling_layers") == []:
        return _import_plain(config, weights, vision_tower)
    options = _options(config, folder)
    pyramid = _pyramid(options, folder)
    special = ROUTER_TOKEN if options["use_special_token"] else None
    apart = {name for name in weights.tensors if ".pooling_router." in name or ".experts." in name}
    rewritten, tokenizer = rewrite_original(config, weights, vision_tower, special, pyramid.prepooling, apart)
    side = rewritten.checkpoint.config["vision_config"]["image_size"]
    if config.get("input_image_size") not in (None, side):
        raise CheckpointError(
            f"{folder} takes images of {config['input_image_size']} pixels, but its vision tower takes {side}: they "
            "must agree"
        )
    if special and options["pooling_type"] == "adaptive":
        router = replace(pyramid.router, token_id=tokenizer.convert_tokens_to_ids(ROUTER_TOKEN))
        pyramid = replace(pyramid, router=router)
    hidden_size = rewritten.checkpoint.config["text_config"]["hidden_size"]
    dpe = _dpe(weights, options, pyramid, hidden_size)
    if unused := apart.difference(planned.name for planned in dpe.values()):
        raise CheckpointError(
            f"{folder} holds {len(unused)} tensors of routers or experts that `pooling` in config.json does not name, "
            f"such as {min(unused)}: config and weights do not belong together"
        )
    return rewritten.with_pyramid(pyramid, dpe, _notes(options, pyramid))


def _import_plain(config: dict[str, Any], weights: Weights, vision_tower: str | None) -> Rewritten:
    """Take a LLaVA without a pyramid, as the authors' code writes it too."""
    options = config["pooling"]
    if options.get("prepooling"):
        raise CheckpointError(
            f"{weights.folder}: `pooling` in config.json has prepooling and no layers: expected both, or neither as a "
            "plain LLaVA"
        )
    special = ROUTER_TOKEN if options.get("use_special_token") else None
    rewritten, _ = rewrite_original(config, weights, vision_tower, special)
    note = "Its config.json names no layer to pool after, so it is a plain LLaVA, and gets the recipe's pyramid."
    return replace(rewritten, notes=(*rewritten.notes, note))


def _options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    found = config["pooling"]
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder}: `pooling` in config.json is {found!r}, expected an object")
    options = _DEFAULTS | found
    for key, known in _OPTIONS.items():
        if options.get(key) not in known:
            expected = " or ".join(map(str, known))
            raise CheckpointError(
                f"{folder}: pooling.{key} in config.json is {options.get(key)!r}, expected {expected}"
            )
    if options["pooling_type"] == "static" and options["pooling_function"] == "conv":
        raise CheckpointError(f"{folder} asks for static pooling by convolution, which the authors' code cannot do")
    return options


def _pyramid(options: Mapping[str, Any], folder: Path) -> PyramidConfig:
    """Return the pyramid; the token of its routers is not known yet.

    Pooling before layer i is pooling after layer i - 1.
    """
    shift = 1 if options["pooling_location"] == "pre" else 0
    adaptive = options["pooling_type"] == "adaptive"
    try:
        layers = sorted(options["pooling_layers"], key=lambda layer: layer["index"])
        sites = [Site(layer["index"] - shift, pool(*_rates(layer, adaptive, folder))) for layer in layers]
    except (KeyError, TypeError, ValueError, IndexError):
        raise CheckpointError(f"{folder}: pooling.pooling_layers in config.json is damaged") from None
    if not sites or sites[0].after_layer < 0 or any(a.after_layer >= b.after_layer for a, b in pairwise(sites)):
        raise CheckpointError(
            f"{folder}: pooling.pooling_layers in config.json pools at {[layer['index'] for layer in layers]} "
            f"({options['pooling_location']}): expected different layers, and none before the first"
        )
    return PyramidConfig(
        sites=tuple(sites),
        pooling=options["pooling_function"],
        gate="probability" if adaptive else "none",
        positions="contiguous",
        rounding="floor",
        router=RouterConfig(
            kind="mlp" if options["router_version"] == "v1" else "linear",
            input="last_instruction_token",
            output="logits",
        ),
        prepooling=2 if options["prepooling"] else 1,
        min_visual_tokens=1,
        min_input_tokens=MIN_TOKENS,
        calibration={IMPORTED_KEY: True},
        static_route=None if adaptive else tuple(len(site.experts) - 1 for site in sites),
    )


def _rates(layer: Mapping[str, Any], adaptive: bool, folder: Path) -> tuple[Rate, ...]:
    """Return the kernels of one layer; a static one has one, to which 1×1 is added."""
    kernels, strides = layer["kernel_size"], layer["stride"]
    if not adaptive:
        kernels, strides = [[1, 1], kernels], [[1, 1], strides]
    rates = tuple((int(height), int(width)) for height, width in kernels)
    if rates != tuple((int(height), int(width)) for height, width in strides):
        raise CheckpointError(f"{folder} pools with overlapping or spaced kernels: expected strides equal to kernels")
    if rates[0] != (1, 1) or any(min(rate) < 1 or rate[0] * rate[1] > MIN_TOKENS for rate in rates):
        raise CheckpointError(f"{folder} pools with the kernels {list(rates)}: expected 1×1 first, and none above 4×4")
    return rates


def _dpe(weights: Weights, options: Mapping[str, Any], pyramid: PyramidConfig, hidden_size: int) -> dict[str, Planned]:
    """Return every tensor of the pyramid in float32, by its full name; biases that their linear layers lack are zero.

    Raises:
        CheckpointError: if one is missing or has another shape.
    """
    shift = 1 if options["pooling_location"] == "pre" else 0
    names = _ROUTER[options["router_version"]]
    planned: dict[str, Planned] = {}
    for name, shape in pyramid.dpe_tensors(hidden_size).items():
        kind, site, part = name.split(".", 2)
        layer = f"model.layers.{pyramid.sites[int(site)].after_layer + shift}"
        new = f"{TEXT_PREFIXES[0]}{name}"
        if kind == "poolers":
            stored, stored_shape = f"{layer}.experts.{part}.weight", (shape[0], 1, *shape[1:])
        elif part in names:
            stored, stored_shape = f"{layer}.pooling_router.{names[part]}", shape
        else:
            planned[new] = Planned(new, "F32", shape, weights.folder, partial(_zeros, shape))
            continue
        found = weights.tensors[stored].shape if stored in weights.tensors else None
        if found != stored_shape:
            raise CheckpointError(
                f"{weights.folder}: config.json asks for {stored} of {list(stored_shape)}, found "
                f"{'none' if found is None else list(found)}"
            )
        source = Planned.of(weights, stored)
        planned[new] = replace(source, dtype="F32", shape=shape, read=partial(_as_float, source.read, shape))
    return planned


def _zeros(shape: tuple[int, ...]) -> "torch.Tensor":
    import torch

    return torch.zeros(shape)


def _as_float(read: "Callable[[], torch.Tensor]", shape: tuple[int, ...]) -> "torch.Tensor":
    return read().float().reshape(shape)


def _notes(options: Mapping[str, Any], pyramid: PyramidConfig) -> list[str]:
    notes = [f"Its pyramid is imported to give the same outputs, and it needs no calibration: {IMPORTED_USE}."]
    if pyramid.router.token_id is not None:
        notes.append(f"Its routers read the token {ROUTER_TOKEN}, which the chat template puts after every question.")
    if options["pooling_location"] == "pre" and len(pyramid.sites) > 1:
        notes.append(
            "It pools before its layers, where the authors' code loses count of the tokens after a first pooling: "
            "it is imported as it was meant."
        )
    return notes
