"""What a user would pick instead of a pyramid, on the same engine and at equal prefill FLOPs; no torch until asked."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpn_cli.evaluation.contenders.contender import Contender
    from dpn_cli.pyramid.config import PyramidConfig

CONTENDERS = ("original", "fixed", "random", "downsample", "prepool", "fastv", "pyramiddrop", "visionzip")


def make_contender(name: str, pyramid: "PyramidConfig") -> "Contender":
    """Return one of `CONTENDERS`, or `dpn`, to be fitted to a budget.

    Args:
        name: of the contender.
        pyramid: offers the fixed routes, and its sites are those of PyramidDrop.

    Raises:
        KeyError: if there is none of this name.
    """
    from dpn_cli.evaluation.contenders.downsampling import FeaturePooling, ImageDownsampling
    from dpn_cli.evaluation.contenders.fastv import FastV
    from dpn_cli.evaluation.contenders.pyramid_drop import PyramidDrop
    from dpn_cli.evaluation.contenders.random_dropping import RandomDropping
    from dpn_cli.evaluation.contenders.routes import FixedRoute, Original, Routed
    from dpn_cli.evaluation.contenders.vision_zip import VisionZip

    made: list[Contender] = [
        Original(), Routed(), FixedRoute(pyramid, pyramid.full_route), RandomDropping(), ImageDownsampling(),
        FeaturePooling(), FastV(), PyramidDrop(sites=tuple(site.after_layer for site in pyramid.sites)), VisionZip(),
    ]  # fmt: skip
    return {contender.name: contender for contender in made}[name]
