"""A vocabulary that grows by LLaVA's tokens: which rows of the embedding move, and what the new ones are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MULTIPLE = 64  # rows are padded to it, for performance
SPREAD = 1e-5  # of the new rows, as a share of the covariance of the old ones

_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the new embedding.

    Attributes:
        size: number of rows, a multiple of 64.
        kept: number of first rows that stay as they are.
        moved: old row by new row, for the other rows that stay.
    """

    size: int
    kept: int
    moved: dict[int, int]

    def resized(
        self, read: "Callable[[], torch.Tensor]", read_embedding: "Callable[[], torch.Tensor]", seed: int
    ) -> "torch.Tensor":
        """Return an embedding or a head of `size` rows, [size, D].

        New rows are drawn around the mean of the *embedding's* rows, for the head too, as in the conversion of the
        models on the hub.

        Args:
            read: returns the old matrix.
            read_embedding: returns the old embedding.
            seed: random seed for the new rows; the same seed gives the same rows.
        """
        import torch

        old = read()
        if self.size > self.kept:
            new = draw_rows(read_embedding()[: self.kept], self.size - self.kept, seed).to(old.dtype)
            old, before = torch.cat([old[: self.kept], new]), old
            for row, place in self.moved.items():
                old[row] = before[place]
        return old


def draw_rows(embedding: "torch.Tensor", count: int, seed: int) -> "torch.Tensor":
    """Draw rows from N(mean, 1e-5 · covariance) of an embedding's rows.

    A sum of the n centred rows, with weights from N(0, 1e-5 / n), has exactly this distribution: no covariance matrix
    is made or factored, and one pass in pieces will do.

    Args:
        embedding: the embedding, [n, D].
        count: number of rows to draw.
        seed: random seed for the weights.

    Returns:
        The new rows, [count, D], in float64.

    Source: the distribution is that of transformers' convert_llava_weights_to_hf.py; the way to draw is ours.
    """
    import numpy as np
    import torch

    num_rows = embedding.shape[0]
    weights = torch.from_numpy(np.random.default_rng(seed).normal(0, (SPREAD / num_rows) ** 0.5, (count, num_rows)))
    total = torch.zeros(embedding.shape[1], dtype=torch.float64)
    noise = torch.zeros(count, embedding.shape[1], dtype=torch.float64)
    for start in range(0, num_rows, _CHUNK_ROWS):
        rows = embedding[start : start + _CHUNK_ROWS].double()
        total += rows.sum(0)
        noise += weights[:, start : start + _CHUNK_ROWS] @ rows
    mean = total / num_rows
    return mean + noise - weights.sum(1, keepdim=True) * mean
