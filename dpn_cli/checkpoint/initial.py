"""The tensors that a conversion adds, as they are before any calibration. No torch."""

import math
from collections.abc import Iterator

import numpy as np

INIT_STD = 0.02


def initial_tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the DPE tensors before calibration, in float32.

    The head is zero, so that all rates tie and 1×1 wins (lossless); poolers average; hidden layers are
    drawn from N(0, 0.02²) with a fixed seed, so that a conversion is reproducible.
    """
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name.endswith("hidden.weight"):
            values = random.normal(0.0, INIT_STD, shape)
        elif name.endswith("norm.weight"):
            values = np.ones(shape)
        elif ".poolers." in name:
            values = np.full(shape, 1 / math.prod(shape[1:]))
        else:
            values = np.zeros(shape)
        yield name, values.astype(np.float32)
