"""Which tensor goes into which shard of an export, under which name, and what it is stored as."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from dpn_cli.checkpoint.headers import BITS, DTYPES, SINGLE_FILE, TORCH_DTYPES, Checkpoint, TensorInfo
from dpn_cli.checkpoint.lora import Lora
from dpn_cli.errors import CheckpointError, UsageError
from dpn_cli.exporting.quantise import Quantiser, is_linear
from dpn_cli.families.tensors import COMPUTED, memory_name
from dpn_cli.pyramid.config import FITTED_PARTS

TEXT_MODEL = "model.language_model."
_PRECISE = tuple(f"{TEXT_MODEL}{part}." for part in FITTED_PARTS)  # what stays in float32, whatever the dtype

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Move:
    """A tensor of the source, and what becomes of it.

    Attributes:
        tensor: the tensor in the source.
        name: the tensor's name in the output.
        dtype: the dtype, as safetensors spells it, before any quantisation.
        scheme: how it is quantised, or None.
        lora: the adapter that is merged into it, or None.
    """

    tensor: TensorInfo
    name: str
    dtype: str
    scheme: Quantiser | None = None
    lora: Lora | None = None

    @property
    def is_untouched(self) -> bool:
        """Whether the output has the source's bytes."""
        return self.dtype == self.tensor.dtype and self.scheme is None and self.lora is None

    @cached_property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor that it becomes, by name."""
        if self.scheme is None:
            return {self.name: (self.dtype, self.tensor.shape)}
        return self.scheme.stored(self.name, TORCH_DTYPES[self.dtype], self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Its size in the output."""
        return sum(prod(shape) * BITS[dtype] // 8 for dtype, shape in self.stored.values())


@dataclass(frozen=True)
class Plan:
    """What an export will write.

    Attributes:
        source: the converted checkpoint.
        shards: Tensors of each file.
    """

    source: Checkpoint
    shards: dict[str, list[Move]]

    @property
    def moves(self) -> Iterator[Move]:
        """All of them, in the order of the shards."""
        return (move for moves in self.shards.values() for move in moves)

    @property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor of the output, by name."""
        return {name: what for move in self.moves for name, what in move.stored.items()}

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(move.nbytes for move in self.moves)


def plan_export(
    source: Checkpoint,
    dtype: str | None,
    scheme: Quantiser | None,
    lora: Lora | None,
    max_shard_bytes: int,
    left_out: tuple[str, ...] = (),
) -> Plan:
    """Say which tensor goes where: shards are filled in the order of the layers.

    Args:
        source: the converted checkpoint.
        dtype: `bf16`, `fp16` or `fp32` for all but routers and predictors; None leaves every tensor as it is.
        scheme: how the decoder's linear layers are quantised, or None.
        lora: an adapter to merge, or None.
        max_shard_bytes: the most bytes in a file, unless a single tensor has more.
        left_out: prefixes of the new names of tensors to leave out.

    Raises:
        CheckpointError: if the checkpoint has a tensor that the model has not, or lacks one of the adapter.
    """
    named = {_name(tensor, source): tensor for tensor in source.tensors.values() if not tensor.name.endswith(COMPUTED)}
    if lora and (unknown := lora.targets.difference(named)):
        raise CheckpointError(
            f"{lora.folder} changes {min(unknown)}, which is not in {source.path}: calibrate it again"
        )
    kept = [name for name in sorted(named, key=_natural) if not name.startswith(left_out)]
    moves = [_move(named[name], name, dtype, scheme, lora) for name in kept]
    return Plan(source, _fill_shards(moves, max_shard_bytes))


def parse_size(size: str) -> int:
    """Return a size in bytes from words such as `2GB`, or a number of bytes.

    Raises:
        UsageError: if it is not a size.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Z]*)", size.strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"{size!r} is not a size: expected bytes, or a number with KB, MB or GB, such as 2GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _name(tensor: TensorInfo, source: Checkpoint) -> str:
    name = memory_name(tensor.name)
    if name is None:
        raise CheckpointError(
            f"{source.path / tensor.file} holds {tensor.name!r}, which no LLaVA has: convert it again"
        )
    return name


def _move(tensor: TensorInfo, name: str, dtype: str | None, scheme: Quantiser | None, lora: Lora | None) -> Move:
    new = tensor.dtype
    if dtype is not None and tensor.dtype in TORCH_DTYPES:
        new = "F32" if name.startswith(_PRECISE) else DTYPES[dtype]
    quantised = scheme is not None and is_linear(name, tensor.shape) and scheme.takes(tensor.shape)
    healed = lora is not None and name in lora.targets
    return Move(tensor, name, new, scheme if quantised else None, lora if healed else None)


def _fill_shards(moves: list[Move], max_bytes: int) -> dict[str, list[Move]]:
    shards: list[list[Move]] = [[]]
    for move in moves:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + move.nbytes > max_bytes:
            shards.append([])
        shards[-1].append(move)
    count = len(shards)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return dict(zip(names, shards, strict=True))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
