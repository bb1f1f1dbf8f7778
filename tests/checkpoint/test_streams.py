import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpn_cli.checkpoint.headers import BITS, TensorInfo, read_header
from dpn_cli.checkpoint.streams import only_finite, read_pieces, verify_bytes
from dpn_cli.errors import CheckpointError, DpnError


def info(dtype: str, count: int) -> TensorInfo:
    return TensorInfo("w", "x.safetensors", dtype, (count,), 0, count * BITS[dtype] // 8)


def as_floats(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])


@given(raw=st.binary(min_size=8, max_size=64).map(lambda raw: raw[: len(raw) // 8 * 8]))
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_bits_tell_what_numpy_tells(dtype: str, raw: bytes) -> None:
    values = as_floats(raw, dtype)
    pieces = only_finite([raw], info(dtype, values.size), Path("x.safetensors"))
    if np.isfinite(values).all():
        assert list(pieces) == [raw]
    else:
        with pytest.raises(CheckpointError, match=r"x\.safetensors: the tensor 'w' holds NaN"):
            list(pieces)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("dtype", "numpy"), [("F16", "<f2"), ("F32", "<f4"), ("F64", "<f8")])
def test_one_bad_value_among_the_largest_good_ones(dtype: str, numpy: str, value: float) -> None:
    values = np.array([np.finfo(numpy).max, np.finfo(numpy).min, 0.0, -0.0], numpy)
    pieces = [values.tobytes(), values[:0].tobytes()]
    assert list(only_finite(pieces, info(dtype, 4), Path())) == pieces
    values[2] = value
    with pytest.raises(CheckpointError):
        list(only_finite([values.tobytes()], info(dtype, 4), Path()))


def test_integers_are_not_looked_at() -> None:
    assert list(only_finite([b"\xff" * 8], info("I64", 1), Path())) == [b"\xff" * 8]


@pytest.fixture
def shard(tmp_path: Path) -> TensorInfo:
    from safetensors.numpy import save_file

    save_file({"w": np.arange(1000, dtype=np.float32)}, tmp_path / "x.safetensors")
    return read_header(tmp_path / "x.safetensors")["w"]


def test_pieces_are_the_tensor(tmp_path: Path, shard: TensorInfo) -> None:
    pieces = list(read_pieces(tmp_path, shard, piece_bytes=1024))
    assert max(map(len, pieces)) == 1024
    assert b"".join(pieces) == np.arange(1000, dtype=np.float32).tobytes()
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(shard.start + 100)
    with pytest.raises(CheckpointError, match="was truncated while it was being read"):
        list(read_pieces(tmp_path, shard))


def test_a_flipped_bit_is_found(tmp_path: Path, shard: TensorInfo) -> None:
    raw = np.arange(1000, dtype=np.float32).tobytes()
    compared: list[int] = []
    verify_bytes(tmp_path, [shard], lambda _: [raw[:1000], raw[1000:]], compared.append)
    assert compared == [len(raw)]
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.seek(shard.start + 2000)
        file.write(b"\x01")
    with pytest.raises(DpnError, match=r"'w' reads back from x\.safetensors with other bytes"):
        verify_bytes(tmp_path, [shard], lambda _: [raw[:1000], raw[1000:]], compared.append)
