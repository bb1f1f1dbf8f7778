"""The bytes of an export's tensors, in small pieces: searched for NaN, merged with an adapter, cast, quantised."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpn_cli.checkpoint.headers import BITS, TORCH_DTYPES, read_header
from dpn_cli.checkpoint.streams import (
    PIECE_BYTES,
    Piece,
    only_finite,
    read_pieces,
    tensor_bytes,
    told,
    verify_bytes,
)
from dpn_cli.checkpoint.writer import write_index, write_named_pieces
from dpn_cli.errors import CheckpointError
from dpn_cli.exporting.plan import Move, Plan
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.reporter import Reporter

if TYPE_CHECKING:
    import torch


def write_weights(stage: Path, plan: Plan, pyramid: PyramidConfig, check_values: bool, reporter: Reporter) -> None:
    """Write the shards of an export, and their index where there are several.

    Args:
        stage: the folder to write into.
        plan: Plan of what is written.
        pyramid: the pyramid to note in the shards' metadata.
        check_values: whether to stop at NaN and infinite values.
        reporter: is told how much has been read.

    Raises:
        CheckpointError: if a value is NaN, infinite, or too large for its new dtype.
    """
    metadata = {"format": "pt", "pyramid": json.dumps(pyramid.to_dict(), ensure_ascii=False)}
    with reporter.copying("writing weights", sum(move.tensor.nbytes for move in plan.moves)) as advance:
        for file, moves in plan.shards.items():
            stored = {name: what for move in moves for name, what in move.stored.items()}
            # Wide dtypes first, as the safetensors library does it: every tensor is aligned to its own elements.
            ordered = dict(sorted(stored.items(), key=lambda item: -BITS[item[1][0]]))
            content = (piece for move in moves for piece in _content(plan.source.path, move, check_values, advance))
            write_named_pieces(stage / file, ordered, content, metadata)
    if len(plan.shards) > 1:
        write_index(stage, [tensor for file in plan.shards for tensor in read_header(stage / file).values()])


def verify_untouched(stage: Path, plan: Plan, reporter: Reporter) -> int:
    """Read every tensor that no option changes back from the disk and compare it with the source.

    Returns:
        The number of tensors compared.

    Raises:
        DpnError: if a byte differs.
    """
    sources = {move.name: move.tensor for move in plan.moves if move.is_untouched}
    written = [tensor for file in plan.shards for tensor in read_header(stage / file).values()]
    untouched = [tensor for tensor in written if tensor.name in sources]
    with reporter.copying("verifying", sum(tensor.nbytes for tensor in untouched)) as advance:
        verify_bytes(stage, untouched, lambda tensor: read_pieces(plan.source.path, sources[tensor.name]), advance)
    return len(untouched)


def _content(
    folder: Path, move: Move, check_values: bool, advance: Callable[[int], None]
) -> Iterator[tuple[str, Piece]]:
    """Yield the bytes of the tensors that a move makes, by name."""
    pieces: Iterator[Piece] = told(read_pieces(folder, move.tensor, _piece_bytes(move)), advance)
    if check_values:
        pieces = only_finite(pieces, move.tensor, folder / move.tensor.file)
    if move.is_untouched:
        yield from ((move.name, piece) for piece in pieces)
        return
    changed = (_changed(move, piece) for piece in pieces)
    if move.scheme is None:
        yield from ((move.name, tensor_bytes(values)) for values in changed)
        return
    for name, tensor in move.scheme.quantised(move.name, move.tensor.shape, changed):
        yield name, tensor_bytes(tensor)


def _piece_bytes(move: Move) -> int:
    """Return how much to read at once: all where an adapter goes in, whole rows where rows are quantised."""
    if move.lora is not None:
        return move.tensor.nbytes
    if move.scheme and move.scheme.by_rows:
        row = move.tensor.shape[1] * BITS[move.tensor.dtype] // 8
        return max(1, PIECE_BYTES // row) * row
    return PIECE_BYTES


def _changed(move: Move, piece: Piece) -> "torch.Tensor":
    """Return a piece's values, flat, merged with the adapter and in the new dtype."""
    import torch

    values = torch.frombuffer(bytearray(piece), dtype=getattr(torch, TORCH_DTYPES[move.tensor.dtype]))
    if move.lora is not None:
        values = move.lora.merged(move.name, values.view(move.tensor.shape)).flatten()
    values = _cast(values, getattr(torch, TORCH_DTYPES[move.dtype]), move, "as bf16")
    if move.scheme and move.scheme.dtype:
        values = _cast(values, getattr(torch, move.scheme.dtype), move, "with --quantize nf4")
    return values


def _cast(values: "torch.Tensor", dtype: "torch.dtype", move: Move, otherwise: str) -> "torch.Tensor":
    import torch

    cast, limit = values.to(dtype), torch.finfo(dtype).max
    if limit < torch.finfo(values.dtype).max and (cast.isinf() & ~values.isinf()).any():
        raise CheckpointError(
            f"{move.tensor.name} has values above {limit:g}, the largest of {dtype}: export {otherwise}"
        )
    return cast
