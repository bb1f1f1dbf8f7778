"""What a user would pick instead of a pyramid, on the same engine and at equal prefill FLOPs; no torch until asked."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dpn_cli.errors import UsageError
from dpn_cli.pyramid.presets import PRESETS

if TYPE_CHECKING:
    from dpn_cli.evaluation.baselines.baseline import Fitted
    from dpn_cli.modeling.wrapper import PyramidGenerationMixin
    from dpn_cli.pyramid.config import PyramidConfig

BASELINES = ("fixed", "downsample", "prepool", *PRESETS)
"""Their names: those that are classes of this package, and the static pyramids."""


def make_baseline(name: str, pyramid: "PyramidConfig") -> "Fitted":
    """Return one of `BASELINES`, to be fitted to a budget.

    Args:
        name: Name of the baseline.
        pyramid: Pyramid to compare with.

    Raises:
        KeyError: if there is none of this name.
    """
    from dpn_cli.evaluation.baselines.downsampling import FeaturePooling, ImageDownsampling
    from dpn_cli.evaluation.baselines.routes import FixedRoute
    from dpn_cli.evaluation.baselines.static import StaticPyramid

    if name in PRESETS:
        return StaticPyramid(name)
    others: list[Fitted] = [FixedRoute(pyramid, pyramid.full_route), ImageDownsampling(), FeaturePooling()]
    return {each.name: each for each in others}[name]


def fit_baselines(
    names: Iterable[str],
    model: "PyramidGenerationMixin",
    budget: float,
    fit: "Callable[[Fitted, float], Sequence[Fitted]]",
) -> "Iterator[tuple[str, Sequence[Fitted], str]]":
    """Yield every name with its baseline in the settings to be tried, or with none and the reason.

    Args:
        names: names from `BASELINES`.
        model: the model that they are to run on.
        budget: mean fraction of the original prefill FLOPs.
        fit: returns the settings of a baseline that are to be tried at the budget.
    """
    for name in names:
        try:
            fitted = fit(make_baseline(name, model.pyramid), budget)
            for baseline in fitted:
                with baseline.applied(model):  # says whether this model is of a kind that it can handle
                    pass
        except (ValueError, UsageError) as error:
            yield name, (), str(error)
        else:
            yield name, fitted, ""
