"""What a user would pick instead of a pyramid, on the same engine and at equal prefill FLOPs; no torch until asked."""

from importlib import import_module
from typing import TYPE_CHECKING

from dpn_cli.pyramid.presets import PRESETS

if TYPE_CHECKING:
    from dpn_cli.evaluation.baselines.baseline import Baseline
    from dpn_cli.pyramid.config import PyramidConfig

_CLASSES = {
    "original": "routes.Original",
    "fixed": "routes.FixedRoute",
    "downsample": "downsampling.ImageDownsampling",
    "prepool": "downsampling.FeaturePooling",
}
BASELINES = (*_CLASSES, *PRESETS)
"""Their names: those that are classes of this package, and the static pyramids."""


def make_baseline(name: str, pyramid: "PyramidConfig") -> "Baseline":
    """Return one of `BASELINES`, to be fitted to a budget.

    Args:
        name: Name of the baseline.
        pyramid: Pyramid to compare with.

    Raises:
        KeyError: if there is none of this name.
    """
    if name in PRESETS:
        static: Baseline = import_module(f"{__name__}.static").StaticPyramid(name)
        return static
    module, _, kind = _CLASSES[name].partition(".")
    baseline: Baseline = getattr(import_module(f"{__name__}.{module}"), kind).beside(pyramid)
    return baseline
