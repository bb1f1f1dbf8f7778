"""The tensors that a conversion adds, as they are before any calibration. No torch.

The head is zero, so that all experts tie and the first one, which keeps all tokens, wins (lossless); poolers average;
other linear layers are drawn from N(0, 0.02²) with a fixed seed, so that a conversion is reproducible.
"""

import math
from collections.abc import Iterator

import numpy as np

INIT_STD = 0.02

_PIECE_VALUES = 1 << 20


def initial_tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the DPE tensors before calibration, in float32."""
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        yield name, np.concatenate(list(_pieces(name, shape, random))).reshape(shape)


def initial_values(shapes: dict[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
    """Yield the same values, one tensor after the other, in small pieces."""
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        yield from _pieces(name, shape, random)


def _pieces(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Iterator[np.ndarray]:
    left = math.prod(shape)
    while left:
        count = min(left, _PIECE_VALUES)
        left -= count
        if ".poolers." in name:
            yield np.full(count, 1 / math.prod(shape[1:]), np.float32)
        elif name.endswith("norm.weight"):
            yield np.ones(count, np.float32)
        elif name.endswith(".weight") and not name.endswith("head.weight"):
            yield random.normal(0.0, INIT_STD, count).astype(np.float32)
        else:
            yield np.zeros(count, np.float32)
