"""A tensor's bytes, piece by piece: read, searched for what is no number, compared. No torch."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpn_cli.checkpoint.headers import TensorInfo
from dpn_cli.errors import CheckpointError, DpnError

if TYPE_CHECKING:
    import torch

Piece = bytes | memoryview
PIECE_BYTES = 16 << 20

# Integers of the same width, and the least of them whose exponent bits are all ones: from there on a value is infinite
# or NaN. With the sign bit set it is the same number as an unsigned integer, which is larger than all others.
_NOT_FINITE = {"F64": (64, 0x7FF << 52), "F32": (32, 0xFF << 23), "F16": (16, 0x1F << 10), "BF16": (16, 0xFF << 7)}


def read_pieces(folder: Path, tensor: TensorInfo, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yield a tensor's bytes.

    Args:
        folder: the folder of the tensor's file.
        tensor: the tensor, as the file's header describes it.
        piece_bytes: the most bytes in a piece.

    Raises:
        CheckpointError: if the file has become shorter than its header says.
    """
    left = tensor.nbytes
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        while left:
            size = min(left, piece_bytes)
            piece = file.read(size)
            if len(piece) < size:
                raise CheckpointError(
                    f"{folder / tensor.file} was truncated while it was being read: run the command again"
                )
            left -= size
            yield piece


def only_finite(pieces: Iterable[Piece], tensor: TensorInfo, file: Path) -> Iterator[Piece]:
    """Pass a tensor's bytes on, and stop at a NaN or an infinite value.

    Args:
        pieces: the tensor's bytes, in pieces of whole values.
        tensor: the tensor that the bytes belong to.
        file: the file that they come from, for messages.

    Raises:
        CheckpointError: at the first piece with such a value.
    """
    for piece in pieces:
        if tensor.dtype in _NOT_FINITE and not _is_finite(piece, *_NOT_FINITE[tensor.dtype]):
            raise CheckpointError(
                f"{file}: the tensor {tensor.name!r} holds NaN or infinite values, so the model is broken: download it "
                "again or start from an earlier state of its training"
            )
        yield piece


def told(pieces: Iterable[Piece], advance: Callable[[int], None]) -> Iterator[Piece]:
    """Pass bytes on, and tell of the number of bytes in each piece once it is taken care of."""
    for piece in pieces:
        yield piece
        advance(len(piece))


def tensor_bytes(tensor: "torch.Tensor") -> memoryview:
    """Return a tensor's bytes, without a copy where it is contiguous."""
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def verify_bytes(
    folder: Path,
    tensors: Iterable[TensorInfo],
    original: Callable[[TensorInfo], Iterable[Piece]],
    advance: Callable[[int], None],
) -> None:
    """Read tensors back from the disk and compare them with what they were made from, byte by byte.

    Args:
        folder: the folder that was written.
        tensors: the written tensors, from its headers.
        original: returns the bytes that a tensor was made from.
        advance: called with the number of bytes compared, after every tensor.

    Raises:
        DpnError: if a byte differs.
    """
    for file, inside in groupby(sorted(tensors, key=lambda t: (t.file, t.start)), key=lambda t: t.file):
        with (folder / file).open("rb") as reader:
            os.fsync(reader.fileno())
            os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from the memory: from the disk
            for tensor in inside:
                reader.seek(tensor.start)
                if any(reader.read(len(piece)) != piece for piece in original(tensor)):
                    raise DpnError(
                        f"the tensor {tensor.name!r} reads back from {file} with other bytes than it was written with: "
                        "check the disk and the memory, then run the command again"
                    )
                advance(tensor.nbytes)


def _is_finite(piece: Piece, bits: int, first: int) -> bool:
    if not piece:
        return True
    values = np.frombuffer(piece, f"<u{bits // 8}")
    negative = first | 1 << (bits - 1)
    return bool(values.view(f"<i{bits // 8}").max() < first and values.max() < negative)
