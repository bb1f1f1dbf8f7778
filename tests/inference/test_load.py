"""`dpn_cli.load` opens what dpn wrote, whole, or says why not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.utils import logging

import dpn_cli
from dpn_cli.checkpoint.headers import Checkpoint, read_json
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import CheckpointError
from dpn_cli.inference.loading import max_positions

NORM = "language_model.model.norm.weight"


@pytest.fixture
def converted(tiny_llava: Path, tmp_path: Path) -> Path:
    convert(str(tiny_llava), output=tmp_path / "tiny-dpn")
    return tmp_path / "tiny-dpn"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a converted folder, and its index with them."""
    file = "model-00001-of-00001.safetensors"
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: shard for name, shard in index["weight_map"].items() if shard != file}
    index["weight_map"] = kept | dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_load_is_quiet_and_ready_to_answer(converted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = logging.get_verbosity()
    model = dpn_cli.load(converted)
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == verbosity and logging.is_progress_bar_enabled()
    assert not model.training
    assert model.pyramid.sites[0].after_layer == -1
    with pytest.raises(ValueError, match="not calibrated"):
        model.set_budget(0.5)


def test_dtype_and_attention_can_be_chosen(converted: Path) -> None:
    model = dpn_cli.load(str(converted), dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 == dpn_cli.load(converted, dtype="bfloat16").dtype
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for p in model.text_model.routers.parameters()} == {torch.float32}


def test_a_relative_folder_and_a_hub_id_are_found(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dpn_cli.load("tiny-dpn").pyramid.sites
    repo = tmp_path / "hub" / "models--someone--tiny-dpn"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    shutil.copytree(converted, repo / "snapshots" / "abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert dpn_cli.load("someone/tiny-dpn").pyramid.sites


def test_what_is_not_converted_is_told_apart(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no pyramid yet: run `dpn convert"):
        dpn_cli.load(tiny_llava)
    with pytest.raises(CheckpointError, match="does not exist"):
        dpn_cli.load(tmp_path / "nothing here")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        dpn_cli.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="expected a LLaVA"):
        dpn_cli.load(tmp_path)


def test_a_pyramid_of_another_version_is_refused(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    config["pyramid"]["version"] = 99
    (converted / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="version 99"):
        dpn_cli.load(converted)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop(NORM), "1 missing keys, such as model.language_model.norm.weight"),
        (lambda tensors: tensors.update(extra=np.zeros(2, np.float32)), "1 unexpected keys, such as extra"),
        (lambda tensors: tensors.update({NORM: np.zeros(3, np.float32)}), r"1 mismatched keys, such as .*norm\.weight"),
    ],
)
def test_tensors_that_are_not_the_models_are_an_error(
    converted: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    edit(converted, change)
    with pytest.raises(CheckpointError, match=complaint):
        dpn_cli.load(converted)


def test_positions_are_read_also_where_the_config_leaves_them_to_a_default(make_converted: Callable[..., Path]) -> None:
    from transformers import LlamaConfig

    folder = make_converted()
    config = read_json(folder / "config.json")
    config["text_config"]["max_position_embeddings"] = 77
    write_json(folder / "config.json", config)
    assert max_positions(Checkpoint.open(folder)) == 77
    del config["text_config"]["max_position_embeddings"]
    write_json(folder / "config.json", config)
    assert max_positions(Checkpoint.open(folder)) == LlamaConfig().max_position_embeddings
