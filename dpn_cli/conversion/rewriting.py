"""A checkpoint that is written anew in Hugging Face's layout, tensor by tensor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_cli.checkpoint.headers import BITS, Checkpoint, TensorInfo, check_float, read_header
from dpn_cli.checkpoint.side_files import copy_side_files
from dpn_cli.checkpoint.streams import tensor_bytes, told
from dpn_cli.checkpoint.writer import Placement, write_shard
from dpn_cli.conversion.weights import Weights
from dpn_cli.families.tensors import COMPUTED
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.reporter import Reporter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Attributes:
        name: the stored name of the tensor that it is made from.
        dtype: the dtype, as safetensors spells it.
        shape: the tensor's shape.
        file: the file that it comes from; what comes from one file goes into one shard.
        read: returns the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    read: "Callable[[], torch.Tensor]"

    @classmethod
    def of(cls, weights: Weights, name: str) -> "Planned":
        """Plan to write a tensor as it is.

        Raises:
            CheckpointError: if it is not one of floating-point numbers.
        """
        info = weights.tensors[name]
        check_float(info, weights.folder)
        return cls(name, info.dtype, info.shape, weights.folder / info.file, lambda: weights.read(name))

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Written:
    """What came into a new folder: the tensors that a loader is to take, and how their shards got there."""

    tensors: list[TensorInfo]
    placement: Placement


@dataclass(frozen=True)
class Rewritten:
    """A checkpoint as it will be, and how to make it.

    Attributes:
        source_config: the source's config.json.
        checkpoint: the checkpoint in Hugging Face's layout; its files are those to be written.
        planned: the checkpoint's tensors, and those of its pyramid.
        write_side_files: writes tokenizer, processor and what else belongs to the model into a folder.
        notes: Notes for the user on the change of layout.
        pyramid: the pyramid that the source already has, or None.
        dpe: the tensors of that pyramid as the source has them, by new name.
    """

    source_config: Mapping[str, Any]
    checkpoint: Checkpoint
    planned: Mapping[str, Planned]
    write_side_files: Callable[[Path], None]
    notes: tuple[str, ...] = ()
    pyramid: PyramidConfig | None = None
    dpe: Mapping[str, TensorInfo] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: Path,
        source_config: Mapping[str, Any],
        config: dict[str, Any],
        planned: Mapping[str, Planned],
        write_side_files: Callable[[Path], None],
        notes: tuple[str, ...] = (),
    ) -> "Rewritten":
        """Give every source file a shard of its own.

        Args:
            folder: the source's folder.
            source_config: the source's config.json.
            config: the new config.json.
            planned: the tensors, by new name.
            write_side_files: writes tokenizer, processor and what else belongs to the model into a folder.
            notes: Notes for the user on the change of layout.
        """
        sources = sorted({tensor.file for tensor in planned.values()})
        shards = {file: f"model-{i:05d}-of-{len(sources):05d}.safetensors" for i, file in enumerate(sources, 1)}
        tensors = {name: TensorInfo(name, shards[t.file], t.dtype, t.shape, 0, t.nbytes) for name, t in planned.items()}
        checkpoint = Checkpoint(folder, config, tensors, tuple(shards.values()))
        return cls(source_config, checkpoint, planned, write_side_files, notes)

    def with_pyramid(self, pyramid: PyramidConfig, dpe: Mapping[str, Planned], notes: Sequence[str]) -> "Rewritten":
        """Return it with a pyramid that the source has.

        Args:
            pyramid: the source's pyramid.
            dpe: the pyramid's tensors, in float32, by new name.
            notes: Notes for the user on the pyramid.
        """
        infos = {name: TensorInfo(t.name, t.file.name, t.dtype, t.shape, 0, t.nbytes) for name, t in dpe.items()}
        planned, notes = {**self.planned, **dpe}, (*self.notes, *notes)
        return replace(self, planned=planned, notes=notes, pyramid=pyramid, dpe=infos)

    def write_weights(self, stage: Path, link: bool, reporter: Reporter) -> Written:
        """Write the shards; about one tensor is in memory at a time; nothing can be linked."""
        written: list[TensorInfo] = []
        with reporter.copying("writing weights", self.checkpoint.nbytes) as advance:
            for file in self.checkpoint.files:
                # Wide dtypes first: every tensor is aligned to its own elements.
                tensors = sorted(
                    (tensor for tensor in self.checkpoint.tensors.values() if tensor.file == file),
                    key=lambda tensor: -BITS[tensor.dtype],
                )
                content = told((piece for tensor in tensors for piece in self.original(tensor.name)), advance)
                write_shard(stage / file, {t.name: (t.dtype, t.shape) for t in tensors}, content, {"format": "pt"})
                written += read_header(stage / file).values()
        return Written(written, "rewritten")

    def original(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes that a tensor is to have; the largest tensor is the most that is in memory."""
        yield tensor_bytes(self.planned[name].read())

    def origin(self, name: str) -> Path:
        """Return the file that a tensor comes from."""
        return self.planned[name].file


def rewrite_weights(
    source_config: Mapping[str, Any], config: dict[str, Any], weights: Weights, notes: tuple[str, ...]
) -> Rewritten:
    """Take a LLaVA in Hugging Face's layout whose weights are .bin shards, or named as in a wrapped model."""
    folder = weights.folder
    planned = {name: Planned.of(weights, name) for name in weights.tensors if not name.endswith(COMPUTED)}
    return Rewritten.of(
        folder, source_config, config, planned, partial(copy_side_files, folder), (*weights.notes, *notes)
    )
