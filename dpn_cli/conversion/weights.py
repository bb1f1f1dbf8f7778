"""Tensors of a checkpoint, one at a time, from safetensors or from .bin shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dpn_cli.checkpoint.headers import (
    BIN_FILE,
    BIN_INDEX_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_DTYPES,
    Checkpoint,
    TensorInfo,
    why_no_weights,
)
from dpn_cli.checkpoint.wrappers import refuse_unfinished, unwrap
from dpn_cli.conversion.bins import BinWeights
from dpn_cli.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class Shards(Protocol):
    """Where tensors of floats come from; `tensors` says which there are, in which file, of which dtype and shape."""

    folder: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> "torch.Tensor":
        """Return one tensor, backed by its file where it can be."""


class Weights:
    """The tensors of a checkpoint, by the names that the model itself has for them.

    Attributes:
        folder: the checkpoint folder.
        tensors: file, dtype and shape of every tensor, by name.
        notes: Notes for the user on the names.
    """

    def __init__(self, shards: Shards) -> None:
        self.folder = shards.folder
        self._shards = shards
        refuse_unfinished(shards.tensors, self.folder)
        own, found = unwrap(shards.tensors)
        self._stored = {new: name for name, new in own.items()}
        self.tensors: Mapping[str, TensorInfo] = {new: shards.tensors[name] for new, name in self._stored.items()}
        if len(self._stored) < len(shards.tensors):
            raise CheckpointError(
                f"{self.folder} holds tensors twice, with {found} in their names and without: keep one of the two"
            )
        self.notes = (f"Its tensors were saved from a wrapped model: {found} is taken off their names.",) * bool(found)

    def read(self, name: str) -> "torch.Tensor":
        """Return one tensor, backed by its file where it can be."""
        return self._shards.read(self._stored[name])


class SafetensorsWeights:
    """The tensors of safetensors shards."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.tensors: Mapping[str, TensorInfo] = Checkpoint.open(folder, config).tensors

    def read(self, name: str) -> "torch.Tensor":
        """Return one tensor: no whole file is mapped, which may be larger than the memory."""
        import torch

        info = self.tensors[name]
        values = bytearray(info.nbytes)
        with (self.folder / info.file).open("rb") as file:
            file.seek(info.start)
            if file.readinto(values) < info.nbytes:
                raise CheckpointError(
                    f"{self.folder / info.file} was truncated while it was being read: run the command again"
                )
        return torch.frombuffer(values, dtype=getattr(torch, TORCH_DTYPES[info.dtype])).view(info.shape)


def open_weights(folder: Path, config: dict[str, Any]) -> Weights:
    """Open what a folder holds; a pickle is not looked at where there are safetensors.

    Args:
        folder: the checkpoint folder.
        config: the checkpoint's config.json.

    Raises:
        CheckpointError: if it holds nothing, or what it holds is damaged.
    """
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return Weights(SafetensorsWeights(folder, config))
    if holds_bins(folder):
        return Weights(BinWeights(folder))
    raise CheckpointError(why_no_weights(folder))


def holds_bins(folder: Path) -> bool:
    """Say whether a folder's weights are .bin shards."""
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return False
    return (folder / BIN_FILE).is_file() or (folder / BIN_INDEX_FILE).is_file()
