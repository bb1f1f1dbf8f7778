"""What a checkpoint folder holds, read from config.json and the safetensors headers alone. No torch."""

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.links import check_links, is_text
from dpn_cli.checkpoint.locks import in_use
from dpn_cli.errors import CheckpointError
from dpn_cli.limits import (
    MAX_CONFIG_BYTES,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_JSON_DEPTH,
    MAX_REPORT_BYTES,
    MAX_SIDE_FILE_BYTES,
    MAX_TOKENIZER_CONFIG_BYTES,
)
from dpn_cli.notation import some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
_TRAINERS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # what training leaves beside the weights
_DEEPSPEED = "{folder} holds a DeepSpeed checkpoint in parts: run `python zero_to_fp32.py . .` in it first"
_FSDP = "{folder} holds an FSDP checkpoint in parts: merge them first, with `accelerate merge-weights`"
QUANTISED = (
    "{folder} is quantised: start from the unquantised model; or, if only its config.json says so, remove "
    "quantization_config from that"
)
_BIN = "{folder} holds its weights as .bin, not as safetensors: convert it with `dpn convert {folder}`"
_OTHER_WEIGHTS = {
    "*.gguf": "{folder} holds a GGUF model, which is quantised for llama.cpp: start from the model in safetensors",
    "zero_to_fp32.py": _DEEPSPEED,
    "global_step*": _DEEPSPEED,
    "mp_rank_*_model_states.pt": _DEEPSPEED,
    "**/*.distcp": _FSDP,
    "*/.metadata": _FSDP,
    BIN_FILE: _BIN,
    BIN_INDEX_FILE: _BIN,
    "mm_projector.bin": "{folder} holds a projector alone: start from a checkpoint with the whole model",
}
"""What weights are that are not in safetensors, by the files that tell, and what to do."""
_ELSEWHERE = ("*/*.safetensors", "*/*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
WEIGHTS_KEY = "transformers_weights"  # of config.json: the index or the file to load in the place of those above
PROCESSOR_FILE, IMAGES_FILE = "processor_config.json", "preprocessor_config.json"
VIDEOS_FILE = "video_preprocessor_config.json"
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS_FILE, GENERATION_FILE = "special_tokens_map.json", "generation_config.json"
LFS_SIGNATURE = b"version https://git-lfs.github.com"

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
TORCH_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # of the floats
FLOATS = set(TORCH_DTYPES)
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # what the user says, what safetensors says


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, as its file's header describes it.

    Attributes:
        name: the stored name; never use it as a path.
        file: the shard, as a path inside the checkpoint folder.
        dtype: the dtype, as safetensors spells it (`F32`, `BF16`).
        shape: the tensor's shape.
        start: the offset of its first byte in the file.
        nbytes: Size in the file, in bytes.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def num_values(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder.

    Attributes:
        path: the folder.
        config: the content of config.json.
        tensors: the tensors that a loader takes, by name.
        files: the shards, in order.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, config: dict[str, Any] | None = None) -> "Checkpoint":
        """Read and check a folder: config, index and every shard's header.

        Args:
            folder: the checkpoint folder.
            config: Content of config.json, if that has been read already.

        Raises:
            CheckpointError: if the folder is damaged; names the file at fault and what to do.
            UsageError: if another run is replacing the folder.
        """
        with in_use(folder):
            config = read_config(folder) if config is None else config
            weights = _weights_file(folder, config)
            if weights.endswith(".json"):
                return cls(folder, config, *_read_shards(folder, weights))
            return cls(folder, config, read_header(folder / weights, weights), (weights,))

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _weights_file(folder: Path, config: dict[str, Any]) -> str:
    """Return the file that transformers begins with, a single one or an index."""
    if named := config.get(WEIGHTS_KEY):
        if not is_inside(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(
                f"{folder / 'config.json'} has the {WEIGHTS_KEY} {named!r}: expected a file in that folder"
            )
        return str(named)
    for file in (SINGLE_FILE, INDEX_FILE):
        if (folder / file).is_file():
            return file
    raise CheckpointError(why_no_weights(folder))


def is_inside(name: object) -> bool:
    """Say whether what a checkpoint names as one of its files is a path that stays in its folder."""
    return isinstance(name, str) and 0 < len(name) <= 256 and "\0" not in name and not {"/", ".."} & {*Path(name).parts}


def _read_shards(folder: Path, index: str) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Return what the shards of an index hold, whether it lists it or not: that is what transformers takes."""
    weight_map = read_weight_map(folder / index, ".safetensors", beside=Path(index).parent)
    files = tuple(sorted(set(weight_map.values())))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, tensor in read_header(folder / file, file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder} holds {name!r} in {tensors[name].file} and in {file}, expected every tensor once: "
                    "download the checkpoint again"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{folder / index} places the tensor {name!r} in {file}, which does not hold it: "
                "download the checkpoint again"
            )
    return tensors, files


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint folder.

    Raises:
        CheckpointError: if it is none, see `check_folder`, or its config.json cannot be read.
    """
    check_folder(folder)
    return read_json(folder / "config.json")


def check_folder(folder: Path) -> None:
    """Check that a folder is a checkpoint's, without links that lead out of it.

    Raises:
        CheckpointError: if it is none, has no config.json, or has such links.
    """
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {kind}: expected a checkpoint folder with config.json")
    if not is_text(folder):
        raise CheckpointError(f"{folder} has a name that is not UTF-8, which no loader opens: rename it")
    check_links(folder)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(adapter_refusal(folder))
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; there is one in {', '.join(inside[-3:])} inside of it" if inside else ""
        raise CheckpointError(
            f"{folder} has no config.json: expected a checkpoint folder in Hugging Face's layout{hint}"
        )


def adapter_refusal(folder: Path) -> str:
    """Say why a folder with a LoRA adapter is refused, and how to merge it: LLaVA's own way, or peft's."""
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else "BASE"
    config = read_json_if_there(folder / "config.json")
    if "mm_vision_tower" in config or (folder / "non_lora_trainables.bin").is_file():
        how = (
            f"`python scripts/merge_lora_weights.py --model-path {folder} --model-base {base} "
            "--save-model-path MERGED` of the LLaVA repository"
        )
    else:
        how = f"peft's `PeftModel.from_pretrained(base, {str(folder)!r}).merge_and_unload()` on {base}"
    return f"{folder} holds a LoRA adapter: merge it into its base model first, with {how}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        CheckpointError: if it does not, is too large, or nests too deeply for whoever walks it.
    """
    if (size := path.stat().st_size) > (most := _max_bytes(path.name)):
        raise CheckpointError(f"{path} has {size:,} bytes, expected at most {most:,}")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise _not_json(path) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    if _is_deeper(data, MAX_JSON_DEPTH):
        raise CheckpointError(f"{path} nests deeper than {MAX_JSON_DEPTH} objects and lists: download it again")
    try:
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # NaN and Infinity, which JSON does not have, or half characters, which nobody could write
        for key, value in _not_finite(data):
            fault = f"has the {key} {json.dumps(value)}, expected a finite number: correct it"
            raise CheckpointError(f"{path} {fault}") from None
        raise _not_json(path) from None
    return data


def _not_json(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is not JSON{_lfs_hint(path)}: download the checkpoint again")


def _max_bytes(name: str) -> int:
    """Return how large a JSON file of a checkpoint may be."""
    if name == TOKENIZER_CONFIG_FILE:
        return MAX_TOKENIZER_CONFIG_BYTES
    if name == "report.json":
        return MAX_REPORT_BYTES
    return MAX_CONFIG_BYTES if name.endswith("config.json") else MAX_SIDE_FILE_BYTES


def _is_deeper(data: Any, depth: int) -> bool:
    level = [data]
    for _ in range(depth):
        inside = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inside for value in values if isinstance(value, dict | list)]
    return bool(level)


def _not_finite(data: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers that are NaN or infinite, with the keys that lead to them."""
    if isinstance(data, float) and not math.isfinite(data):
        yield key, data
    for each, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from _not_finite(value, f"{key}.{each}".removeprefix("."))


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Read a JSON file as `read_json` does; an empty object where there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_header(path: Path, file: str | None = None) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Args:
        path: the safetensors file.
        file: Path inside the checkpoint folder, by default the file's name.

    Raises:
        CheckpointError: if the file is missing, truncated, a Git LFS pointer, or otherwise not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: download the checkpoint again")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(len(LFS_SIGNATURE))
        if prefix == LFS_SIGNATURE:
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in that folder")
        if size < 8:
            raise CheckpointError(f"{path} is truncated ({size} bytes): download it again")
        (length,) = struct.unpack("<Q", prefix[:8])
        if length > size - 8:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: its header should take {length} bytes, "
                f"the file has {size}: download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} has a header of {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        stream.seek(8)
        raw = stream.read(length)
    return _parse_header(path, file or path.name, raw, size)


def _parse_header(path: Path, file: str, raw: bytes, size: int) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(raw, object_pairs_hook=_unique_keys)
        entries.pop("__metadata__", None)
        tensors = [_tensor(file, name, entry, body=8 + len(raw)) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error}): download it again") from None
    tensors.sort(key=lambda tensor: tensor.start)
    expected = 8 + len(raw)
    for tensor in tensors:
        if tensor.start != expected:
            raise CheckpointError(
                f"{path}: the tensor {tensor.name!r} starts at byte {tensor.start}, expected {expected}: "
                "download it again"
            )
        expected += tensor.nbytes
    if expected != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header describes {expected}: it is truncated or damaged, download it again"
        )
    return {tensor.name: tensor for tensor in tensors}


def _tensor(file: str, name: str, entry: dict[str, Any], body: int) -> TensorInfo:
    """Read a header entry; `body` is the file's first byte after the header."""
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name!r} has an impossible shape or place")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (stop - start):
        raise ValueError(f"tensor {name!r} of {dtype} {list(shape)} takes {bits // 8} bytes, not {stop - start}")
    return TensorInfo(name, file, dtype, shape, body + start, stop - start)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name appears twice")
    return result


def check_float(tensor: TensorInfo, folder: Path) -> None:
    """Check that a tensor is one of floating-point numbers.

    Raises:
        CheckpointError: if it is not.
    """
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{folder / tensor.file} holds {tensor.name!r} as {tensor.dtype}, expected floating-point numbers of 16 "
            "bits or more: start from the unquantised model"
        )


def read_weight_map(path: Path, suffix: str, beside: Path = Path()) -> dict[str, str]:
    """Read which shard of a folder holds which tensor.

    Args:
        path: the index.
        suffix: how the names of shards end.
        beside: the index's folder inside the checkpoint; shards are there, or at the top.

    Raises:
        CheckpointError: if it is damaged or leads out of the folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: download the checkpoint again")
    for file in weight_map.values():
        if not is_inside(file) or Path(file).parent not in {Path(), beside} or not file.endswith(suffix):
            raise CheckpointError(f"{path} names the shard {file!r}: expected a {suffix} file in the same folder")
    return weight_map


def why_no_weights(folder: Path) -> str:
    """Say of a folder without weights that can be read what it holds, and what to do."""
    if (folder / "adapter_config.json").is_file():
        return adapter_refusal(folder)
    if dangling := sorted(path.name for path in folder.iterdir() if path.is_symlink() and not path.exists()):
        return f"{folder / dangling[0]} is a link to a file that is not there: download the checkpoint again"
    for pattern, sentence in _OTHER_WEIGHTS.items():
        if any(folder.glob(pattern)):
            return sentence.format(folder=folder)
    for suffix, single, index in ((".safetensors", SINGLE_FILE, INDEX_FILE), (".bin", BIN_FILE, BIN_INDEX_FILE)):
        parts = [path.name for path in folder.glob(f"*{suffix}") if path.name not in _TRAINERS]
        if len(parts) == 1 and "-of-" not in parts[0]:
            return f"{folder} has no {single}, but {parts[0]}: if it holds all of the weights, rename it"
        if parts:
            there = f"{folder} has {len(parts)} {suffix} files, but no {index}, which says what is in which"
            return f"{there}: copy it, or download the checkpoint again"
    there = f"{folder} has no weights, neither {SINGLE_FILE} nor {INDEX_FILE}"
    others = sorted(str(path.relative_to(folder)) for pattern in _ELSEWHERE for path in folder.glob(pattern))
    todo = f", but {some(others)}: give the folder of the model, or save it with `save_pretrained`"
    return f"{there}{todo if others else ': download the checkpoint again'}"


def _lfs_hint(path: Path) -> str:
    return " but a Git LFS pointer" if path.read_bytes().startswith(LFS_SIGNATURE) else ""
