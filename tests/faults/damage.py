"""Ways to damage a sharded checkpoint in Hugging Face's layout."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SHARD, OTHER_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n"
NORM = "language_model.model.norm.weight"

GONE = ...  # in the place of a value: no such key

Harm = Callable[[Path], object]


def overwrite(file: str, content: bytes) -> Harm:
    """Give a file other bytes."""
    return lambda folder: (folder / file).write_bytes(content)


def cut(file: str, stop: int) -> Harm:
    """Keep the first bytes of a file alone."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:stop])


def put(path: Path, *keys: str, value: Any = GONE) -> None:
    """Give a key of a JSON file a value, at the end of the keys that lead to it; without a value, remove it."""
    data = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner.pop(keys[-1], None)
    if value is not GONE:
        inner[keys[-1]] = value
    path.write_text(json.dumps(data))


def edit(file: str, *keys: str, value: Any = GONE) -> Harm:
    """Do the same in a folder's file."""
    return lambda folder: put(folder / file, *keys, value=value)


def place(tensor: str, file: Any = GONE) -> Harm:
    """Let the index say that a tensor is in a file; without one, take it out of the index."""
    return edit(INDEX, "weight_map", tensor, value=file)


def set_tensor(name: str, values: np.ndarray | None, file: str | None = None) -> Harm:
    """Store a tensor, by default in place of the old one and in the index; None removes it from its shard."""

    def harm(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        shard = file or json.loads((folder / INDEX).read_text())["weight_map"][name]
        tensors = load_file(folder / shard)
        tensors.pop(name, None)
        save_file(tensors | ({} if values is None else {name: values}), folder / shard, metadata={"format": "pt"})

    return harm


def set_dtype(name: str, dtype: str, bits: int) -> Harm:
    """Let a header call the bytes of a float32 vector something else."""

    def harm(folder: Path) -> None:
        path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header[name] |= {"dtype": dtype, "shape": [header[name]["shape"][0] * 32 // bits]}
        raw = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])

    return harm


def both(*harms: Harm) -> Harm:
    """Do one after the other."""
    return lambda folder: [harm(folder) for harm in harms]
