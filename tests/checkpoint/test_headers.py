import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpn_cli.checkpoint.headers import Checkpoint, read_header, read_json
from dpn_cli.errors import CheckpointError


def write_file(path: Path, header: dict[str, Any] | bytes, body: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    return path


@pytest.mark.parametrize("shards", [1, 2])
def test_headers_say_what_safetensors_says(tiny_llava_factory: Callable[..., Path], shards: int) -> None:
    from safetensors.numpy import load_file

    folder = tiny_llava_factory(shards=shards)
    checkpoint = Checkpoint.open(folder)
    arrays = {name: array for file in checkpoint.files for name, array in load_file(folder / file).items()}
    assert {n: (t.shape, t.nbytes) for n, t in checkpoint.tensors.items()} == {
        n: (a.shape, a.nbytes) for n, a in arrays.items()
    }
    assert checkpoint.nbytes == sum(array.nbytes for array in arrays.values())
    assert len(checkpoint.files) == shards


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model-00001-of-00002.bin"], r"has 1 \.bin files, but no pytorch_model\.bin\.index\.json"),
        (
            ["model-1.safetensors", "model-2.safetensors"],
            r"has 2 \.safetensors files, but no model\.safetensors\.index",
        ),
        (["consolidated.safetensors"], "no model.safetensors, but consolidated.safetensors: if it holds all"),
        (["model-q4.gguf"], "holds a GGUF model, which is quantised"),
        (["global_step10/zero_pp_rank_0.pt"], "a DeepSpeed checkpoint in parts"),
        (["mp_rank_00_model_states.pt"], "a DeepSpeed checkpoint in parts"),
        (["pytorch_model_fsdp_0/.metadata"], "an FSDP checkpoint in parts"),
        (["pytorch_model.bin"], "holds its weights as .bin, not as safetensors"),
        (["mm_projector.bin"], "holds a projector alone: start from a checkpoint with the whole model"),
        (["zero_to_fp32.py"], "a DeepSpeed checkpoint in parts: run `python zero_to_fp32.py"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "an FSDP checkpoint in parts: merge them first"),
        (
            ["original/pytorch_model.bin"],
            r"neither model.safetensors nor model.safetensors.index.json, but original/pytorch_model.bin: give",
        ),
        (["consolidated.00.pth"], r"neither .*, but consolidated\.00\.pth: .* save it with `save_pretrained`"),
        ([], "neither model.safetensors nor model.safetensors.index.json: download the checkpoint again"),
    ],
)
def test_where_weights_lack_it_says_what_is_there(tmp_path: Path, files: list[str], message: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_link_of_a_cache_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "model.safetensors").symlink_to("../../blobs/0123")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to a file that is not there: download"):
        Checkpoint.open(tmp_path)


def test_empty_and_scalar_tensors_are_fine(tmp_path: Path) -> None:
    header = {
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
        "scalar": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
        "small": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [8, 10]},
        "__metadata__": {"format": "pt"},
    }
    tensors = read_header(write_file(tmp_path / "x.safetensors", header, b"\0" * 10))
    assert [tensors[name].num_values for name in ("empty", "scalar", "small")] == [0, 1, 2]


def test_folders_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "none")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\.bin, not as safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        [],
    ],
)
def test_an_impossible_entry_is_refused(tmp_path: Path, entry: Any) -> None:
    with pytest.raises(CheckpointError):
        read_header(write_file(tmp_path / "x.safetensors", {"x": entry}, b"\0" * 4))


def test_a_name_may_appear_once(tmp_path: Path) -> None:
    entry = '"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    with pytest.raises(CheckpointError, match="twice"):
        read_header(write_file(tmp_path / "x.safetensors", f"{{{entry},{entry}}}".encode()))


@given(content=st.binary(max_size=64) | st.binary(max_size=48).map(lambda b: struct.pack("<Q", len(b)) + b))
def test_noise_is_refused_with_one_kind_of_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_header(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": {"b": [1.5, NaN]}}', r"x\.json has the a\.b\.1 NaN, expected a finite number"),
        ('{"a": -Infinity}', r"x\.json has the a -Infinity, expected"),
        ('{"a": 1e999}', r"x\.json has the a Infinity, expected"),
        (r'{"a": "\ud800"}', r"x\.json is not JSON"),
        ("[" * 100_000, r"x\.json is not JSON"),
    ],
)
def test_what_json_does_not_have_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        read_json(tmp_path / "x.json")
