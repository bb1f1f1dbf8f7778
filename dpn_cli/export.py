"""Write a converted checkpoint as one compact folder that transformers loads, with or without dpn installed.

Tensors are streamed from shard to shard in small pieces: no model is loaded, and without a change of dtype no tensor
is touched (nor torch imported), but for those that healing has an adapter for: it is merged, one weight at a time.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpn_cli.bundle import BUNDLE_MODULE, bundle_modeling
from dpn_cli.checkpoint.architecture import memory_name
from dpn_cli.checkpoint.headers import BITS, SINGLE_FILE, Checkpoint, TensorInfo, read_header
from dpn_cli.checkpoint.layout import COMPUTED, DPN_ARCHITECTURE, DPN_MODEL_TYPE, LlavaLayout, open_converted
from dpn_cli.checkpoint.lora import Lora, without_adapter
from dpn_cli.checkpoint.staging import check_space, check_target, staged_folder
from dpn_cli.checkpoint.writer import copy_file, side_files, write_index, write_json, write_shard
from dpn_cli.errors import CheckpointError, DpnError, UsageError
from dpn_cli.model_card import model_card
from dpn_cli.modeling.pyramid_config import PyramidConfig

DEFAULT_SHARD_SIZE = "2GB"
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # what the user says, what safetensors says
AUTO_MAP = {
    "AutoConfig": f"{BUNDLE_MODULE}.DpnLlavaConfig",
    "AutoModel": f"{BUNDLE_MODULE}.DpnLlavaModel",
    "AutoModelForImageTextToText": f"{BUNDLE_MODULE}.{DPN_ARCHITECTURE}",
}

_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes:
        source: the converted folder.
        output: the exported folder.
        pyramid: as stored in its config.json.
        files: its shards.
        num_tensors: in them.
        nbytes: of the tensors.
        dtype: the one that the tensors were converted to, or None where they were left as they were.
    """

    source: Path
    output: Path
    pyramid: PyramidConfig
    files: tuple[str, ...]
    num_tensors: int
    nbytes: int
    dtype: str | None


@dataclass(frozen=True)
class Move:
    """A tensor of the source, and its name and dtype (in safetensors' words) in the output."""

    tensor: TensorInfo
    name: str
    dtype: str

    @property
    def nbytes(self) -> int:
        """Return its size in the output."""
        return self.tensor.num_values * BITS[self.dtype] // 8


def export(
    checkpoint: Path,
    output: Path,
    dtype: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    budget: float | None = None,
    force: bool = False,
) -> Export:
    """Write a converted checkpoint as one compact folder: weights, code, processor and model card.

    Args:
        checkpoint: a folder that `dpn convert` wrote, calibrated or not.
        output: the folder to write.
        dtype: `bf16`, `fp16` or `fp32` for all floating-point tensors but the routers', which stay float32; None
            leaves every tensor as it is, byte for byte.
        max_shard_size: in bytes, or as `2GB`, `500MB`.
        budget: mean fraction of the original's prefill FLOPs to spend; None keeps what calibration chose.
        force: replace an output that dpn wrote before.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged, or not converted.
        UsageError: if the output exists or overlaps the checkpoint, or an option makes no sense for it.
    """
    source, layout, pyramid = open_converted(checkpoint)
    lora = Lora.of(checkpoint, pyramid)
    pyramid = replace(pyramid, calibration=without_adapter(pyramid.calibration))
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    pyramid = _with_budget(pyramid, budget)
    shards = plan_shards(source, dtype, parse_size(max_shard_size))
    if lora and (unknown := lora.targets.difference(move.name for moves in shards.values() for move in moves)):
        raise CheckpointError(f"{lora.folder} changes {min(unknown)}, which {checkpoint} has not: calibrate it again")
    check_target(output, force, DPN_MODEL_TYPE, source.path)
    check_space(output, sum(move.nbytes for moves in shards.values() for move in moves))
    done = Export(
        source=checkpoint,
        output=output,
        pyramid=pyramid,
        files=tuple(shards),
        num_tensors=sum(map(len, shards.values())),
        nbytes=sum(move.nbytes for moves in shards.values() for move in moves),
        dtype=dtype,
    )
    config = _config(source, layout, pyramid, dtype)
    with staged_folder(output, force, DPN_MODEL_TYPE, source.path) as stage:
        for file in side_files(source.path):
            copy_file(source.path / file, stage / file)
        (stage / f"{BUNDLE_MODULE}.py").write_text(bundle_modeling(), encoding="utf-8")
        (stage / "README.md").write_text(model_card(output.resolve().name, config, layout, pyramid), encoding="utf-8")
        write_json(stage / "config.json", config)
        _write_weights(stage, source.path, shards, pyramid, lora)
        _verify(stage, shards, output)
    return done


def parse_size(size: int | str) -> int:
    """Return a size in bytes from a number or from words such as `2GB`.

    Raises:
        UsageError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"{size!r} is no size: expected bytes, or a number with KB, MB or GB, such as 2GB")
    return int(float(match[1]) * _UNITS[match[2]])


def plan_shards(source: Checkpoint, dtype: str | None, max_shard_bytes: int) -> dict[str, list[Move]]:
    """Say which tensor goes where: shards are filled in the order of the layers.

    Raises:
        CheckpointError: if the checkpoint has a tensor that the model has not.
    """
    moves = [_move(tensor, source, dtype) for tensor in source.tensors.values() if not tensor.name.endswith(COMPUTED)]
    shards: list[list[Move]] = [[]]
    for move in sorted(moves, key=lambda move: _natural(move.name)):
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + move.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(move)
    count = len(shards)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    # Wide dtypes first, as the safetensors library does it: every tensor is aligned to its own elements.
    return {name: sorted(moves, key=lambda m: -BITS[m.dtype]) for name, moves in zip(names, shards, strict=True)}


def _move(tensor: TensorInfo, source: Checkpoint, dtype: str | None) -> Move:
    name = memory_name(tensor.name)
    if name is None:
        raise CheckpointError(
            f"{source.path / tensor.file} holds {tensor.name!r}, which no LLaVA has: convert it again"
        )
    if dtype is None or tensor.dtype not in _TORCH_DTYPES:
        return Move(tensor, name, tensor.dtype)
    return Move(tensor, name, "F32" if ".routers." in name else DTYPES[dtype])


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _with_budget(pyramid: PyramidConfig, budget: float | None) -> PyramidConfig:
    if budget is None:
        return pyramid
    try:
        return replace(pyramid, trade_off=pyramid.trade_off_for(budget))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _config(source: Checkpoint, layout: LlavaLayout, pyramid: PyramidConfig, dtype: str | None) -> dict[str, Any]:
    """Return the config.json of the export."""
    config = source.config | {"architectures": [DPN_ARCHITECTURE], "auto_map": AUTO_MAP, "pyramid": pyramid.to_dict()}
    stored = source.tensors[f"{layout.text_prefix}embed_tokens.weight"].dtype
    if dtype is None:
        return {"dtype": config.get("torch_dtype") or _TORCH_DTYPES.get(stored)} | config
    for part in ("text_config", "vision_config"):
        config[part] = {key: value for key, value in config[part].items() if key not in {"dtype", "torch_dtype"}}
    config.pop("torch_dtype", None)
    return config | {"dtype": _TORCH_DTYPES[DTYPES[dtype]]}


def _write_weights(
    stage: Path, source: Path, shards: dict[str, list[Move]], pyramid: PyramidConfig, lora: Lora | None
) -> None:
    metadata = {"format": "pt", "pyramid": json.dumps(pyramid.to_dict(), ensure_ascii=False)}
    for file, moves in shards.items():
        tensors = {move.name: (move.dtype, move.tensor.shape) for move in moves}
        content = ((move.name, piece) for move in moves for piece in _content(source, move, lora))
        write_shard(stage / file, tensors, content, metadata)
    if len(shards) > 1:
        write_index(stage, [tensor for file in shards for tensor in read_header(stage / file).values()])


def _content(source: Path, move: Move, lora: Lora | None) -> Iterator[bytes]:
    """Yield a tensor's bytes in its new dtype, piece by piece; at once where an adapter goes into it."""
    healed = lora is not None and move.name in lora.targets
    left = move.tensor.nbytes
    with (source / move.tensor.file).open("rb") as file:
        file.seek(move.tensor.start)
        while left:
            piece = file.read(left if healed else min(left, _PIECE_BYTES))
            if not piece or (healed and len(piece) < left):
                raise CheckpointError(f"{source / move.tensor.file} became shorter meanwhile: run the same line again")
            left -= len(piece)
            if healed or move.dtype != move.tensor.dtype:
                yield _changed(piece, move, lora if healed else None)
            else:
                yield piece


def _changed(piece: bytes, move: Move, lora: Lora | None) -> bytes:
    import torch

    old, new = (getattr(torch, _TORCH_DTYPES[dtype]) for dtype in (move.tensor.dtype, move.dtype))
    values = torch.frombuffer(bytearray(piece), dtype=old)
    if lora is not None:
        values = lora.merged(move.name, values.view(move.tensor.shape))
    cast = values.to(new)
    if (cast.isinf() & ~values.isinf()).any():
        limit = torch.finfo(new).max
        raise CheckpointError(f"{move.tensor.name} has values above {limit:g}, the largest of {new}: export as bf16")
    return cast.view(torch.uint8).numpy().tobytes()


def _verify(stage: Path, shards: dict[str, list[Move]], output: Path) -> None:
    """Reopen what was written: every tensor must be there, in its shape and dtype."""
    written, _, _ = open_converted(stage)
    expected = {move.name: (move.dtype, move.tensor.shape) for moves in shards.values() for move in moves}
    if {name: (t.dtype, t.shape) for name, t in written.tensors.items()} != expected:
        raise DpnError(f"{output}: the written tensors are not the expected ones; please report this")
