"""What routers read, of all samples, in a file: at seven billion parameters it is up to a megabyte a sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class StoredFeatures:
    """Features [N, P, inputs, D] in float16, indexed as a tensor would be; a mapping lasts for one look.

    Attributes:
        path: the file.
        size: N, P, inputs and D of the whole file.
        rows: the file's rows that these are, in order.
    """

    path: Path
    size: tuple[int, int, int, int]
    rows: Sequence[int]

    @classmethod
    def create(cls, path: Path, size: tuple[int, int, int, int]) -> "StoredFeatures":
        """Start a file of zeros, which takes no room on the disk before it is written to."""
        with path.open("wb") as file:
            file.truncate(2 * prod(size))
        return cls(path, size, range(size[0]))

    def __setitem__(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Write some rows; not through the mapping, for which a full disk would be the end of the process."""
        with self.path.open("r+b") as file:
            for row, value in zip(rows.tolist(), values, strict=True):
                file.seek(self.rows[row] * value.nbytes)
                file.write(value.numpy().tobytes())

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """Read some rows."""
        stored = np.memmap(self.path, np.float16, "r", shape=self.size)
        return torch.from_numpy(stored[torch.tensor(self.rows)[rows].numpy()])  # a copy, as of any such index

    def part(self, rows: Sequence[int]) -> "StoredFeatures":
        """Return some of the rows, without reading any."""
        return StoredFeatures(self.path, self.size, [self.rows[row] for row in rows])
