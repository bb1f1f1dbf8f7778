import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpn_cli.checkpoint.layout import open_llava, validate_llava
from dpn_cli.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "layout", "prefix"),
    [("llama", "hub", "language_model.model."), ("qwen2", "new", "model.language_model.")],
)
def test_the_layout_is_read(tiny_llava_factory: Callable[..., Path], text: str, layout: str, prefix: str) -> None:
    checkpoint, found = open_llava(tiny_llava_factory(text=text, layout=layout))
    assert found.text_prefix == prefix
    assert found.grid == (12, 12)
    assert (found.shape.num_layers, found.shape.hidden_size, found.shape.num_kv_heads) == (8, 64, 2)
    assert f"{prefix}layers.7.mlp.up_proj.weight" in checkpoint.tensors


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "original layout": (
        {"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "clip"},
        "original LLaVA",
    ),
    "text only": ({"model_type": "llama", "vision_config": None}, "expected a LLaVA"),
    "another vision model": ({"model_type": "idefics3"}, "'idefics3'"),
    "no text_config": ({"text_config": None}, "no text_config"),
    "no vision_config": ({"vision_config": None}, "no vision_config"),
    "no image token": ({"image_token_index": None}, "no image_token_index"),
    "quantised": ({"quantization_config": {}}, "is quantised"),
    "another language model": ({"text_config": {"model_type": "gemma"}}, "'gemma'"),
    "sliding window by default": ({"text_config": {"model_type": "mistral"}}, "sliding-window attention"),
    "sliding window": (
        {"text_config": {"model_type": "qwen2", "use_sliding_window": True}},
        "sliding-window",
    ),
    "another tower": ({"vision_config": {"model_type": "pixtral"}}, "'pixtral'"),
    "class token kept": ({"vision_feature_select_strategy": "full"}, "'full' features"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_have_a_pyramid_is_refused(tiny_llava: Path, change: str) -> None:
    config = json.loads((tiny_llava / "config.json").read_text())
    validate_llava(copy.deepcopy(config), tiny_llava)
    changes, message = CHANGES[change]
    with pytest.raises(CheckpointError, match=message):
        validate_llava(config | changes, tiny_llava)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 128, "do not belong together"),
        ("num_key_value_heads", 4, "do not belong together"),
        ("vocab_size", 300, "do not belong together"),
        ("num_hidden_layers", 6, "6 decoder layers, the weights have 8"),
        ("num_hidden_layers", "8", "impossible text_config.num_hidden_layers"),
        ("num_attention_heads", 0, "impossible text_config.num_attention_heads"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    tiny_llava: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_llava(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_grid_pinpoints": [[24, 48], [24]]},
        {"image_grid_pinpoints": 48},
        {"image_grid_pinpoints": [[24.5, 48]]},
        {"image_grid_pinpoints": [[12, 48]]},
        {"vision_aspect_ratio": "square"},
        {"vision_aspect_ratio": "anyres_max_0"},
        {"vision_aspect_ratio": 9},
        {"vision_config": {"model_type": "siglip_vision_model", "patch_size": 4}},
    ],
)
def test_tiles_that_cannot_be_are_refused(
    tiny_tiled: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(tiny_tiled("llava_onevision", "qwen2"), tmp_path / "copy"))
    assert open_llava(folder)[1].image_grids([(50, 70)]) == ((5, 5), (8, 11), (8, 1))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match="how images are cut into tiles"):
        open_llava(folder)


def test_an_adapter_beside_the_weights_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "copy"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it"):
        open_llava(folder)
