"""Pieces of work on disk, so that a killed run goes on where it stopped."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from dpn_cli.checkpoint.writer import replace_file

T = TypeVar("T")


@dataclass(frozen=True)
class KeptFiles(Generic[T]):
    """Batches on disk.

    Attributes:
        folder: the folder of the files.
        name: the name of a batch's file, a format of its number.
        read: reads a batch from a file.
        write: writes a batch into a file.
        first: the number of the first batch.
    """

    folder: Path
    name: str
    read: Callable[[Path], T]
    write: Callable[[Path, T], object]
    first: int = 0

    def load(self, piece: int) -> T | None:
        """Return a batch, or None if it was not kept or cannot be read."""
        path = self._path(piece)
        try:
            return self.read(path) if path.is_file() else None
        except Exception:  # noqa: BLE001 - a damaged file of a lost disk is made again
            return None

    def save(self, piece: int, value: T) -> None:
        """Keep a batch."""
        replace_file(self._path(piece), lambda path: self.write(path, value))

    def after(self, first: int) -> "KeptFiles[T]":
        """Return the batches that are numbered from `first`, as if from 0."""
        return replace(self, first=self.first + first)

    def _path(self, piece: int) -> Path:
        return self.folder / self.name.format(self.first + piece)
