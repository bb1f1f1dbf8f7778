"""bitsandbytes' 8- and 4-bit weights as transformers stores them: which tensors stand for which weight. No torch."""

from collections.abc import Iterable
from math import prod

from dpn_cli.checkpoint.headers import TensorInfo
from dpn_cli.pyramid.config import FITTED_PARTS

# What stays unquantised: matched at the start of a module's name, as a pattern, or at its end. A list replaces
# transformers' own: lm_head.
SKIPPED = ["lm_head", "model.vision_tower", "model.multi_modal_projector", *(rf".*\.{part}" for part in FITTED_PARTS)]

# The ends of the names of tensors that tell how a weight was quantised.
_STATISTICS = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".SCB", ".weight_format")


def num_parameters(tensor: TensorInfo) -> int:
    """Return how many parameters of the model a tensor stands for: two per byte where they are packed in 4 bits."""
    if tensor.name.endswith(_STATISTICS):
        return 0
    return tensor.num_values * 2 if tensor.dtype == "U8" else tensor.num_values


def has_shape(tensor: TensorInfo, shape: Iterable[int]) -> bool:
    """Say whether a tensor is a weight of some shape; packed in 4 bits it is one of [values / 2, 1]."""
    shape = tuple(shape)
    return tensor.shape == shape or (tensor.dtype == "U8" and tensor.shape == (prod(shape) // 2, 1))
