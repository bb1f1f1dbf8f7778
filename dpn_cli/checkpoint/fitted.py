"""Whether calibration has fitted what chooses in a converted checkpoint; conversion only makes room for it."""

from collections.abc import Sequence

from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.layout import LlavaLayout
from dpn_cli.checkpoint.streams import read_pieces
from dpn_cli.errors import UsageError
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.experts import KINDS, Expert


def is_fitted(source: Checkpoint, layout: LlavaLayout, pyramid: PyramidConfig) -> bool:
    """Say whether nothing is routed, or the routers are others than conversion adds, whose heads of zeros keep all."""
    if pyramid.static_route is not None:
        return True
    heads = (source.tensors[name] for name in layout.added_tensors(pyramid) if ".head." in name)
    return any(any(piece) for head in heads for piece in read_pieces(source.path, head))


def validate_predictors(
    source: Checkpoint, layout: LlavaLayout, pyramid: PyramidConfig, route: Sequence[Expert], or_else: str = ""
) -> None:
    """Check that the predictors on a route have been fitted.

    Args:
        source: the converted checkpoint.
        layout: the decoder's layout.
        pyramid: the checkpoint's pyramid.
        route: the experts that are to choose.
        or_else: an option that lifts the check.

    Raises:
        UsageError: if they are those that conversion adds.
    """
    predicting = next((expert for expert in route if KINDS[expert.kind].predictor_tensors), None)
    if predicting is None or is_fitted(source, layout, pyramid):
        return
    lift = f", or pass {or_else}" if or_else else ""
    raise UsageError(
        f"{source.path} is not calibrated, so {predicting} would keep random tokens: run `dpn calibrate --data DATA` "
        f"first, or choose another route{lift}"
    )
