"""What a user would pick instead of a pyramid, on the same engine and at equal prefill FLOPs; no torch until asked."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpn_cli.evaluation.baselines.contender import Contender
    from dpn_cli.pyramid.config import PyramidConfig

BASELINES = {
    "original": "routes.Original",
    "fixed": "routes.FixedRoute",
    "random": "random_dropping.RandomDropping",
    "downsample": "downsampling.ImageDownsampling",
    "prepool": "downsampling.FeaturePooling",
    "fastv": "fastv.FastV",
    "pyramiddrop": "pyramid_drop.PyramidDrop",
    "visionzip": "vision_zip.VisionZip",
}
"""Their classes, by module of this package."""


def make_baseline(name: str, pyramid: "PyramidConfig") -> "Contender":
    """Return one of `BASELINES`, to be fitted to a budget.

    Args:
        name: of the contender.
        pyramid: that it is compared with.

    Raises:
        KeyError: if there is none of this name.
    """
    module, _, kind = BASELINES[name].partition(".")
    contender: Contender = getattr(import_module(f"{__name__}.{module}"), kind).beside(pyramid)
    return contender
