"""Write the parts of a checkpoint folder: copies, JSON, the index. No torch."""

import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import BIN_INDEX_FILE, BITS, INDEX_FILE, TensorInfo

RECIPE_FILE = "dpn_recipe.json"

_LEFT_OUT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx", ".py", ".md",
}  # fmt: skip
_REWRITTEN = {"config.json", INDEX_FILE, BIN_INDEX_FILE, RECIPE_FILE}
_MAX_SIDE_FILE_BYTES = 64 << 20
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_CHUNK_BYTES = 1 << 30


def side_files(folder: Path) -> Iterator[str]:
    """Yield the small files that belong to the model: tokenizer, processor, template, licence."""
    for path in sorted(folder.iterdir()):
        left_out = path.suffix in _LEFT_OUT_SUFFIXES or path.name.startswith(".") or path.name in _REWRITTEN
        if path.is_file() and not left_out and path.stat().st_size <= _MAX_SIDE_FILE_BYTES:
            yield path.name


def copy_file(source: Path, target: Path) -> int:
    """Copy a file's bytes, inside the kernel where it can (shared extents on file systems that have them).

    Returns:
        The number of bytes.
    """
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            while os.copy_file_range(reader.fileno(), writer.fileno(), _CHUNK_BYTES):
                pass
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            reader.seek(0)
            writer.seek(0)
            shutil.copyfileobj(reader, writer, 1 << 24)
        writer.flush()
        return os.fstat(writer.fileno()).st_size


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write an object as transformers writes its own: two spaces, a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, sync it to disk, and put it in the place of `path`."""
    stage = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(stage)
        descriptor = os.open(stage, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        stage.replace(path)
    finally:
        stage.unlink(missing_ok=True)


def write_index(folder: Path, tensors: list[TensorInfo]) -> None:
    """Write the index over all shards of a folder."""
    index = {
        "metadata": {
            "total_parameters": sum(tensor.num_values for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {tensor.name: tensor.file for tensor in sorted(tensors, key=lambda tensor: tensor.name)},
    }
    write_json(folder / INDEX_FILE, index)


def write_shard(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    content: Iterable[bytes | memoryview],
    metadata: dict[str, str],
) -> None:
    """Write a safetensors file from a stream, so that no more than a piece of it is ever in memory.

    Args:
        path: of the file.
        tensors: dtype (in safetensors' words) and shape of every tensor, in the order of their bytes.
        content: the bytes of all tensors, in pieces of any size.
        metadata: for the header; `format` tells transformers the framework.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    stop = 0
    for name, (dtype, shape) in tensors.items():
        start, stop = stop, stop + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.writelines(content)
