"""Write the parts of a checkpoint folder: copies, JSON, the index. No torch."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import INDEX_FILE, TensorInfo

_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_CHUNK_BYTES = 1 << 30


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


def write_index(folder: Path, tensors: list[TensorInfo]) -> None:
    """Write the index over all shards of a folder."""
    index = {
        "metadata": {
            "total_parameters": sum(tensor.num_values for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {
            tensor.name: tensor.file for tensor in sorted(tensors, key=lambda tensor: tensor.name)
        },
    }
    write_json(folder / INDEX_FILE, index)
