"""Which way samples take through an exported pyramid: by the routers at a budget, or one fixed route for all.

The fixed route is one of the pyramid's, or a method of the literature, which has sites of its own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.fitted import is_fitted, validate_predictors
from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.layout import LlavaLayout
from dpn_cli.checkpoint.lora import without_adapter
from dpn_cli.errors import RouteError, UsageError, did_you_mean
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.experts import KINDS
from dpn_cli.pyramid.presets import PRESETS, parse_preset
from dpn_cli.pyramid.route import parse_route


def validate_calibrated(
    source: Checkpoint, layout: LlavaLayout, pyramid: PyramidConfig, exported: PyramidConfig
) -> None:
    """Check that what chooses in an export has been fitted.

    Args:
        source: the converted checkpoint.
        layout: the decoder's layout.
        pyramid: the checkpoint's pyramid.
        exported: the export's.

    Raises:
        UsageError: if its routers, or the predictors on its route, are those that conversion adds.
    """
    if is_fitted(source, layout, pyramid):
        return
    if exported.static_route is None:
        raise UsageError(
            f"{source.path} is not calibrated, so its export would keep all tokens: run `dpn calibrate --data DATA` "
            "first, or pass --static for a fixed route, or --uncalibrated"
        )
    validate_predictors(source, layout, pyramid, exported.experts(exported.static_route), or_else="--uncalibrated")


def exported_pyramid(
    pyramid: PyramidConfig, layout: LlavaLayout, budget: float | None, static: str | None
) -> PyramidConfig:
    """Return the pyramid as an export has it.

    Args:
        pyramid: the converted checkpoint's pyramid.
        layout: the decoder's layout.
        budget: mean fraction of the prefill FLOPs to spend; None keeps what calibration chose.
        static: a fixed route for every sample, in place of the routers, or one of `PRESETS` with its settings; None for
            the routers.

    Raises:
        UsageError: if the budget or the route is not one of this pyramid's.
    """
    pyramid = replace(pyramid, calibration=_for_others(without_adapter(pyramid.calibration)))
    if static is None:
        return pyramid if budget is None else _with_budget(pyramid, budget)
    if budget is not None:
        raise UsageError("a static route costs the same whatever the budget: give --static or --budget, not both")
    chosen = _static(static, pyramid, layout.shape.num_layers)
    try:
        chosen.walk(chosen.own_routes[0], [layout.grid])
    except ValueError as error:
        raise UsageError(str(error)) from None
    return chosen


def _static(text: str, pyramid: PyramidConfig, num_layers: int) -> PyramidConfig:
    """Return a pyramid on one of its own routes, or as a preset for the same prompts and features."""
    try:
        return _on_route(parse_route(text, pyramid.sites), pyramid)
    except RouteError:
        preset = parse_preset(text, num_layers)
        if preset is None and _is_written_as_route(text):
            raise
    if preset is None:
        raise UsageError(
            f"{text!r} is neither a method ({', '.join(PRESETS)}) nor a route of this pyramid (an expert for each of "
            f"its {len(pyramid.sites)} sites).{did_you_mean(text.partition(':')[0], (*PRESETS, *KINDS))}"
        )
    return replace(preset, prepooling=pyramid.prepooling, answer_cue=pyramid.answer_cue)


def _is_written_as_route(text: str) -> bool:
    """Say whether a text lists experts, be they misspelt or too few; a method may have settings (`K=3,R=0.5`)."""
    first, comma, _ = text.partition(",")
    return "=" not in text and bool(comma or first.partition(":")[0].strip() in KINDS)


def _on_route(route: Route, pyramid: PyramidConfig) -> PyramidConfig:
    """Return a pyramid whose samples all take one route."""
    # What calibration measured is the routers' doing; what it trained is in the weights.
    trained = {key: value for key, value in pyramid.calibration.items() if key == "training" and value}
    return replace(pyramid, static_route=route, trade_off=0.0, budgets=(), calibration=trained)


def _for_others(calibration: dict[str, Any]) -> dict[str, Any]:
    """Keep the places of somebody's disk out of a folder that may be published: of a data path, its last name."""
    found = {key: _for_others(value) if isinstance(value, dict) else value for key, value in calibration.items()}
    data = found.get("data")
    if isinstance(data, str) and Path(data).expanduser().is_absolute():
        found["data"] = Path(data).name
    return found


_AT_ONE_BUDGET = {"distortion", "agreement", "agreement_interval"}  # of `calibration`


def _with_budget(pyramid: PyramidConfig, budget: float) -> PyramidConfig:
    try:
        trade_off = pyramid.trade_off_for(budget)
    except ValueError as error:
        raise UsageError(str(error)) from None
    # What calibration measured at its own budget says nothing of another.
    kept = {key: value for key, value in pyramid.calibration.items() if key not in _AT_ONE_BUDGET}
    is_same = trade_off == pyramid.trade_off
    return replace(pyramid, trade_off=trade_off, calibration=pyramid.calibration if is_same else kept)
