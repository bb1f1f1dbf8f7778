"""Write the parts of a checkpoint folder: copies, JSON, the index. No torch."""

import errno
import fcntl
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from dpn_cli.checkpoint.headers import BITS, INDEX_FILE, TensorInfo
from dpn_cli.errors import DpnError

RECIPE_FILE = "dpn_recipe.json"

_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_CHUNK_BYTES = 64 << 20
_FICLONE = 0x40049409  # ioctl(2): share a file's extents, copy-on-write

Placement = Literal["cloned", "linked", "copied", "rewritten"]  # how a shard came into a new folder


def copy_file(source: Path, target: Path, advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Copy a file's bytes, inside the kernel where it can (shared extents on file systems that have them).

    Args:
        source: the file to copy.
        target: the copy.
        advance: called with the number of bytes copied, every so often.
    """
    done = 0
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            while copied := os.copy_file_range(reader.fileno(), writer.fileno(), _CHUNK_BYTES):
                done += copied
                advance(copied)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            reader.seek(done)
            writer.seek(done)
            while chunk := reader.read(_CHUNK_BYTES):
                advance(writer.write(chunk))


def link_file(source: Path, target: Path) -> Placement:
    """Give a file a second name without a second set of bytes: a reflink, else a hard link, else a copy.

    The bytes of a reflink part when one of the two is written to; those of a hard link never do. A symbolic link (as
    in the hub's cache) is followed first.
    """
    source = source.resolve()
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
            return "cloned"
        except OSError:
            target.unlink()
    try:
        os.link(source, target)
        return "linked"
    except OSError:
        copy_file(source, target)
        return "copied"


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write an object as transformers writes its own: two spaces, a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_file(path: Path, write: Callable[[Path], object], stage_folder: Path | None = None) -> None:
    """Let `write` make a file in a folder, by default that of `path`, sync it, and put it in the place of `path`."""
    stage = (stage_folder or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    stage.unlink(missing_ok=True)  # it may be a link that was put there
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
        path: the file to write.
        tensors: dtype (in safetensors' words) and shape of every tensor, in the order of their bytes.
        content: the bytes of all tensors, in pieces of any size.
        metadata: the header's metadata; `format` tells transformers the framework.
    """
    with path.open("xb") as file:
        file.write(_header(tensors, metadata)[0])
        file.writelines(content)


def write_named_pieces(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    content: Iterable[tuple[str, bytes | memoryview]],
    metadata: dict[str, str],
) -> None:
    """Write a safetensors file as `write_shard` does, from pieces that come in another order than the tensors.

    Args:
        path: the file to write.
        tensors: dtype and shape of every tensor, as in `write_shard`.
        content: pieces by tensor name; those of one tensor in order.
        metadata: the header's metadata, as in `write_shard`.

    Raises:
        DpnError: if the pieces are not exactly the tensors' bytes.
    """
    header, places = _header(tensors, metadata)
    written = {name: start for name, (start, _) in places.items()}
    with path.open("xb") as file:
        file.write(header)
        for name, piece in content:
            file.seek(written[name])
            written[name] += file.write(piece)
    if written != {name: stop for name, (_, stop) in places.items()}:
        raise DpnError(f"{path.name}: the bytes written are not those that the header promises; please report this")


def _header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return a file's first bytes, and the first and the last place of every tensor in it."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    stop = 0
    for name, (dtype, shape) in tensors.items():
        start, stop = stop, stop + math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    body = 8 + len(raw)
    places = {name: (body + start, body + stop) for name in tensors for start, stop in [entries[name]["data_offsets"]]}
    return struct.pack("<Q", len(raw)) + raw, places
