"""PyTorch's .bin shards: pickles, of which nothing but tensors is read, memory-mapped and one shard at a time."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpn_cli.checkpoint.headers import (
    BIN_FILE,
    BIN_INDEX_FILE,
    LFS_SIGNATURE,
    TensorInfo,
    read_weight_map,
)
from dpn_cli.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


REMAP_BYTES = 256 << 20  # after so many read, a shard is mapped anew: what was read leaves the memory


class BinWeights:
    """The tensors of a folder's .bin shards.

    Attributes:
        folder: the checkpoint folder.
        tensors: Tensors in the shards, by name; `start` means nothing here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shard: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._read_bytes = 0
        self.tensors: Mapping[str, TensorInfo] = self._scan()

    def read(self, name: str) -> "torch.Tensor":
        """Return one tensor, mapped into memory for as long as it is used."""
        info = self.tensors[name]
        if self._read_bytes > REMAP_BYTES and zipfile.is_zipfile(self.folder / info.file):
            self._shard = ("", {})
        tensor = self._open(info.file)[name]
        self._read_bytes += info.nbytes
        return tensor

    def _scan(self) -> dict[str, TensorInfo]:
        """Read which tensors there are: no values, the shards are mapped into memory."""
        if (self.folder / BIN_FILE).is_file():  # it wins over an index, as in transformers
            return {name: _describe(name, BIN_FILE, tensor) for name, tensor in self._open(BIN_FILE).items()}
        index = self.folder / BIN_INDEX_FILE
        weight_map = read_weight_map(index, ".bin")
        found: dict[str, TensorInfo] = {}
        for file in sorted(set(weight_map.values())):
            shard = self._open(file)
            for name in (name for name, place in weight_map.items() if place == file):
                if name not in shard:
                    raise CheckpointError(
                        f"{index} places the tensor {name!r} in {file}, which does not hold it: "
                        "download the checkpoint again"
                    )
                found[name] = _describe(name, file, shard[name])
        return found

    def _open(self, file: str) -> "dict[str, torch.Tensor]":
        if self._shard[0] != file:
            self._shard, self._read_bytes = ("", {}), 0  # unmap one before the next
            self._shard = (file, _load(self.folder / file))
        return self._shard[1]


def _load(path: Path) -> "dict[str, torch.Tensor]":
    """Map the tensors of one shard into memory.

    Raises:
        CheckpointError: if it is missing, damaged, or holds anything else than named tensors.
    """
    import torch

    _refuse_pointer(path)
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        shard = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is damaged or holds Python objects besides tensors, which could run code, so nothing was read: "
            "get the model as safetensors"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or damaged: download it again") from error
    if not isinstance(shard, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in shard.values()):
        inside = isinstance(shard, dict) and next((k for k in ("state_dict", "model", "module") if k in shard), None)
        hint = f"; those under its key {inside!r} may be: store them alone" if inside else ""
        raise CheckpointError(f"{path} does not hold only named tensors: expected the weights of a model{hint}")
    return shard


def _refuse_pointer(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: download the checkpoint again")
    with path.open("rb") as file:
        if file.read(len(LFS_SIGNATURE)) == LFS_SIGNATURE:
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in that folder")


def _describe(name: str, file: str, tensor: "torch.Tensor") -> TensorInfo:
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{file} holds {name!r} with fewer values than its shape has: download it again")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{file} holds {name!r} as {dtype}, expected one of {', '.join(DTYPES)}")
    return TensorInfo(name, file, DTYPES[dtype], tuple(tensor.shape), 0, tensor.nbytes)
