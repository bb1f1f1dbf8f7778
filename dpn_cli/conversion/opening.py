"""Open whatever LLaVA a user brings for conversion: which layout is it, and how does it get into a new folder?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dpn_cli.checkpoint.headers import (
    SINGLE_FILE,
    Checkpoint,
    TensorInfo,
    adapter_refusal,
    read_config,
    read_header,
)
from dpn_cli.checkpoint.layout import DPE_FILE, completed, validate_llava, without_window
from dpn_cli.checkpoint.side_files import copy_side_files
from dpn_cli.checkpoint.streams import Piece, read_pieces
from dpn_cli.checkpoint.wrappers import unwrap
from dpn_cli.checkpoint.writer import Placement, copy_file, link_file
from dpn_cli.conversion.dpn_authors import import_authors
from dpn_cli.conversion.original import is_original, rewrite_original, validate_original
from dpn_cli.conversion.rewriting import Rewritten, Written, rewrite_weights
from dpn_cli.conversion.weights import holds_bins, open_weights
from dpn_cli.errors import CheckpointError, UsageError
from dpn_cli.families.family import is_converted
from dpn_cli.families.vision import VISION_TOWERS
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.reporter import Reporter


class Opened(Protocol):
    """A source, as convert needs it."""

    @property
    def source_config(self) -> Mapping[str, Any]:
        """Return the source's config.json."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Return the config and tensors of the new folder, without the pyramid."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know about the change of layout."""

    @property
    def pyramid(self) -> PyramidConfig | None:
        """Return the pyramid that the source has already, in another layout."""

    @property
    def dpe(self) -> Mapping[str, TensorInfo]:
        """Return the tensors of that pyramid as the source has them, by their names in the new folder."""

    def write_side_files(self, folder: Path) -> None:
        """Write tokenizer, processor and what else belongs to the model into a folder."""

    def write_weights(self, stage: Path, link: bool, reporter: Reporter) -> Written:
        """Write the shards into a folder.

        Args:
            stage: the folder to write into.
            link: let shards that stay as they are share their bytes with the source, where the file system can.
            reporter: is told how much is written.
        """

    def original(self, name: str) -> Iterator[Piece]:
        """Yield the bytes that a tensor, of the pyramid too, has in the new folder, from the source."""

    def origin(self, name: str) -> Path:
        """Return the source's file that a tensor comes from."""


@dataclass(frozen=True)
class Copied:
    """A source in Hugging Face's layout, in safetensors: its files are copied as they are. No torch."""

    source_config: Mapping[str, Any]
    checkpoint: Checkpoint
    notes: tuple[str, ...] = ()
    pyramid: None = None
    dpe: Mapping[str, TensorInfo] = field(default_factory=dict)

    def write_side_files(self, folder: Path) -> None:
        """Copy what goes along."""
        copy_side_files(self.checkpoint.path, folder)

    def write_weights(self, stage: Path, link: bool, reporter: Reporter) -> Written:
        """Copy or link the shards."""
        folder = self.checkpoint.path
        tensors: list[TensorInfo] = []
        placements: set[Placement] = set()
        sizes = {file: (folder / file).stat().st_size for file in self.checkpoint.files}
        with reporter.copying("writing weights", sum(sizes.values())) as advance:
            for file, size in sizes.items():
                name = _shard_name(file)
                if link:
                    placements.add(link_file(folder / file, stage / name))
                    advance(size)
                else:
                    copy_file(folder / file, stage / name, advance)
                tensors += read_header(stage / name).values()
        return Written(tensors, placements.pop() if len(placements) == 1 else "copied")

    def original(self, name: str) -> Iterator[bytes]:
        """Yield a tensor's bytes."""
        return read_pieces(self.checkpoint.path, self.checkpoint.tensors[name])

    def origin(self, name: str) -> Path:
        """Return the file that a tensor comes from."""
        return self.checkpoint.path / self.checkpoint.tensors[name].file


def open_source(folder: Path, vision_tower: str | None = None) -> Opened:
    """Open a LLaVA that has no pyramid yet.

    Args:
        folder: the checkpoint folder.
        vision_tower: folder or hub id of a CLIP model, for a checkpoint in the original LLaVA layout.

    Raises:
        CheckpointError: if it is missing, damaged, or of a kind that cannot be converted.
        UsageError: if a vision tower is given to a checkpoint that has its own.
    """
    original = completed(read_config(folder))
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(adapter_refusal(folder))
    if is_converted(original):
        raise CheckpointError(f"{folder} is already a pyramid: calibrate it, or convert its base model again")
    if is_original(original):
        return _open_original(folder, original, vision_tower)
    config, notes = without_window(original)
    validate_llava(config, folder)
    if not VISION_TOWERS[config["vision_config"]["model_type"]].is_stock:
        raise CheckpointError(
            f"{folder} is a LLaVA-HR that has already been converted: start from its original checkpoint"
        )
    if vision_tower is not None:
        raise UsageError(f"{folder} has a vision tower of its own: leave --vision-tower out")
    if holds_bins(folder):
        return rewrite_weights(original, config, open_weights(folder, original), notes)
    checkpoint = Checkpoint.open(folder, config)
    if unwrap(checkpoint.tensors)[1]:
        return rewrite_weights(original, config, open_weights(folder, original), notes)
    if DPE_FILE in checkpoint.files:
        raise CheckpointError(
            f"{folder} has a shard named {DPE_FILE}, as the pyramid's will be: rename it, in the index too"
        )
    return Copied(original, checkpoint, notes)


def _open_original(folder: Path, config: dict[str, Any], vision_tower: str | None) -> Rewritten:
    """Open a LLaVA in the original layout, of the pyramid's authors too."""
    validate_original(config, folder)
    weights = open_weights(folder, config)
    if "pooling" in config:
        opened = import_authors(config, weights, vision_tower)
    else:
        opened = rewrite_original(config, weights, vision_tower)[0]
    validate_llava(opened.checkpoint.config, folder)
    return opened


def _shard_name(file: str) -> str:
    """Return a shard's new name: a file named model.safetensors would shadow the index."""
    return "model-00001-of-00001.safetensors" if file == SINGLE_FILE else Path(file).name
