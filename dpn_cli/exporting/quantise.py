"""The decoder's linear layers in 8 or 4 bits, by bitsandbytes, in the layout that transformers reads.

A weight is quantised a piece at a time: blocks of 64 values (nf4) and rows (int8) know nothing of each other, so the
bytes are those that quantising the whole weight on loading gives. Not doubly quantised, as calibration in 4 bits loads
a model too: routers that were fitted with `load_in: 4bit` meet the very weights they were fitted to.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dpn_cli.checkpoint.quantisation import SKIPPED

if TYPE_CHECKING:
    import torch

Scheme = Literal["int8", "nf4"]
Shape = tuple[int, ...]
BLOCK = 64  # values that share a scale in nf4, bitsandbytes' default
PIECE_VALUES = 1 << 20  # quantised at once

_LAYERS = "model.language_model.layers."


def is_linear(name: str, shape: Shape) -> bool:
    """Say whether a tensor is the weight of one of the decoder's linear layers."""
    return name.startswith(_LAYERS) and len(shape) == 2


@dataclass(frozen=True)
class Quantiser:
    """What one scheme makes of a weight [out, in].

    Attributes:
        load_in: transformers' name of the scheme, in a `BitsAndBytesConfig`.
        takes: Says whether bitsandbytes takes a weight of this shape.
        stored: Returns dtype (in safetensors' words) and shape of the tensors that stand for a weight, by name, from
            its name, torch's name of the dtype that it is computed in, and its shape.
        quantised: Yields these tensors, by name, the quantised values in pieces, from the weight's name, its shape, and
            its values, flat: whole rows where rows are quantised, else whole blocks.
        dtype: torch's name of the dtype that values are cast to first; None leaves them in that of the computation.
        by_rows: whether rows are quantised, and not blocks.
    """

    load_in: str
    takes: Callable[[Shape], bool]
    stored: Callable[[str, str, Shape], dict[str, tuple[str, Shape]]]
    quantised: "Callable[[str, Shape, Iterable[torch.Tensor]], Iterator[tuple[str, torch.Tensor]]]"
    dtype: str | None = None
    by_rows: bool = False


def quantization_config(scheme: Quantiser, dtype: str, left: Iterable[str]) -> dict[str, Any]:
    """Return what config.json tells transformers.

    Args:
        scheme: Quantisation scheme of the weights.
        dtype: torch's name of the dtype to compute in.
        left: names of the decoder's linear weights that are not quantised.
    """
    _bitsandbytes()
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        **{scheme.load_in: True},
        llm_int8_skip_modules=[*SKIPPED, *(name.removesuffix(".weight") for name in left)],
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    known: dict[str, Any] = config.to_dict()
    return {key: value for key, value in known.items() if not key.startswith("_")}


def _int8_stored(name: str, dtype: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
    stem = name.removesuffix("weight")
    return {name: ("I8", shape), f"{stem}SCB": ("F32", (shape[0],)), f"{stem}weight_format": ("U8", ())}


def _int8(name: str, shape: Shape, pieces: "Iterable[torch.Tensor]") -> "Iterator[tuple[str, torch.Tensor]]":
    import torch

    functional, scales = _bitsandbytes(), []
    for piece in pieces:
        for rows in piece.view(-1, shape[1]).split(max(1, PIECE_VALUES // shape[1])):
            values, scale, _ = functional.int8_vectorwise_quant(rows)
            scales.append(scale)
            yield name, values
    stem = name.removesuffix("weight")
    yield f"{stem}SCB", torch.cat(scales)
    yield f"{stem}weight_format", torch.zeros((), dtype=torch.uint8)  # 0 is bitsandbytes' word for rows


def _nf4_takes(shape: Shape) -> bool:
    return shape[1] >= BLOCK and shape[0] % 32 == 0


def _nf4_stored(name: str, dtype: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
    import torch

    count = shape[0] * shape[1]
    state = _state_dict(torch.empty(-(-count // BLOCK)), dtype, shape)
    dtypes = {torch.float32: "F32", torch.uint8: "U8"}
    return {name: ("U8", (-(-count // 2), 1))} | {
        f"{name}.{key}": (dtypes[tensor.dtype], tuple(tensor.shape)) for key, tensor in state.items()
    }


def _nf4(name: str, shape: Shape, pieces: "Iterable[torch.Tensor]") -> "Iterator[tuple[str, torch.Tensor]]":
    import torch

    functional, scales, dtype = _bitsandbytes(), [], ""
    for piece in pieces:
        dtype = str(piece.dtype).removeprefix("torch.")
        for values in piece.flatten().split(PIECE_VALUES):
            packed, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
            scales.append(state.absmax)
            yield name, packed
    for key, tensor in _state_dict(torch.cat(scales), dtype, shape).items():
        yield f"{name}.{key}", tensor


def _state_dict(absmax: "torch.Tensor", dtype: str, shape: Shape) -> "dict[str, torch.Tensor]":
    """Return how bitsandbytes stores what it knows of a weight in nf4."""
    import torch

    functional = _bitsandbytes()
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=functional.get_4bit_type("nf4", device="cpu"),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=getattr(torch, dtype),
    )
    packed = state.as_dict(packed=True)
    return {key: tensor for key, tensor in packed.items() if isinstance(tensor, torch.Tensor)}


def _bitsandbytes() -> Any:
    from dpn_cli.inference.adapter import hush_bitsandbytes

    hush_bitsandbytes()
    from bitsandbytes import functional

    return functional


SCHEMES: dict[Scheme, Quantiser] = {
    "int8": Quantiser("load_in_8bit", lambda shape: True, _int8_stored, _int8, dtype="float16", by_rows=True),
    "nf4": Quantiser("load_in_4bit", _nf4_takes, _nf4_stored, _nf4),
}
