import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_checkpoint import LAYOUTS, hub_config
from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.inspection import Inspection, inspect_checkpoint
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import CheckpointError, UsageError
from dpn_cli.families.tensors import llava_tensors
from dpn_cli.families.text import TEXT_MODELS
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.conftest import CHAT_TEMPLATE
from tests.pyramids import POOLING


@pytest.fixture(scope="module")
def converted(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(
        str(tiny_llava),
        load_recipe("llava-1.5-7b", [*POOLING, "pyramid.min_visual_tokens=16"]),
        tmp_path_factory.mktemp("inspect") / "out",
    ).output


def visual_tokens(found: Inspection, name: str) -> list[int]:
    (route,) = (cost for cost in found.routes if cost.name == name)
    return [layer.visual_tokens for layer in route.layers]


def test_tokens_follow_the_rates_layer_by_layer(converted: Path) -> None:
    found = inspect_checkpoint(converted)
    assert visual_tokens(found, "full") == [144] * 8
    assert visual_tokens(found, "pool:1x2,pool:1x2,pool:1x2") == [144, 144, 72, 72, 36, 36, 24, 24]
    # 12×12 → 6×6; 2×2 again would leave 9 of at least 16 tokens, so 1×2 → 6×3, and then nothing
    assert visual_tokens(found, "pool:2x2,pool:1x2,keep") == [144, 144, 36, 36, 18, 18, 18, 18]


def test_fractions_and_bytes_fit_the_layers(converted: Path) -> None:
    found = inspect_checkpoint(converted, text_tokens=10)
    full, *others, cheapest = found.routes
    assert full.fraction == pytest.approx(1, abs=2e-3)
    for cost in (full, *others, cheapest):
        ratio = sum(layer.flops for layer in cost.layers) / sum(layer.flops for layer in full.layers)
        assert ratio <= cost.fraction == pytest.approx(ratio, abs=2e-3)  # routers cost a little
        assert cheapest.fraction <= cost.fraction
    # keys and values, 2 heads of 16, 4 bytes each
    assert [layer.kv_bytes for layer in full.layers] == [2 * 154 * 2 * 16 * 4] * 8


def test_the_sample_is_typical_of_the_calibration_data(converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text())

    def inspect(record: object, **options: Any) -> tuple[str, tuple[tuple[int, int], ...], int]:
        config["pyramid"]["calibration"] = record
        (folder / "config.json").write_text(json.dumps(config))
        found = inspect_checkpoint(folder, **options)
        return found.sample_from, found.grids, found.text_tokens

    record = {"text_tokens": 11, "grids": [[12, 12], [12, 12]]}
    assert inspect(record) == ("calibration", ((12, 12), (12, 12)), 11)
    assert inspect(record, text_tokens=30) == ("options", ((12, 12), (12, 12)), 30)
    assert inspect(record, images=1) == ("options", ((12, 12),), 11)
    for older in ({}, {"text_tokens": "11", "grids": [[12, 12]]}, {"text_tokens": 11, "grids": []}):
        assert inspect(older) == ("default", ((12, 12),), 64)


def test_parts_add_up(converted: Path, tiny_llava: Path) -> None:
    parts = {part.name: part for part in inspect_checkpoint(converted).parts}
    assert sum(part.nbytes for part in parts.values()) == Checkpoint.open(converted).nbytes
    assert set(parts) == {"language_model", "lm_head", "multi_modal_projector", "vision_tower", "pyramid"}
    before = {part.name: part for part in inspect_checkpoint(tiny_llava).parts}
    assert parts["language_model"] == before["language_model"]
    assert parts["lm_head"].parameters == 304 * 64


def test_an_unconverted_model_has_the_full_route_alone(tiny_llava: Path) -> None:
    found = inspect_checkpoint(tiny_llava)
    assert [cost.name for cost in found.routes] == ["full"]
    assert found.routes[0].fraction == 1
    assert found.to_dict()["pyramid"] is None


def test_samples_without_and_with_several_images(converted: Path) -> None:
    assert visual_tokens(inspect_checkpoint(converted, images=0), "cheapest") == [0] * 8
    assert visual_tokens(inspect_checkpoint(converted, images=2), "full") == [288] * 8
    with pytest.raises(UsageError, match="2048 positions"):
        inspect_checkpoint(converted, text_tokens=2000)


def test_tiles_depend_on_the_size_and_number_of_images(tiny_tiled: Callable[..., Path], tmp_path: Path) -> None:
    onevision = convert(str(tiny_tiled("llava_onevision", "qwen2")), output=tmp_path / "out").output
    found = inspect_checkpoint(onevision, image_size=(30, 70))
    assert found.grids == ((5, 5), (6, 15), (6, 1))
    # any pooling would leave the whole with fewer than 16 tokens
    assert visual_tokens(found, "cheapest") == visual_tokens(found, "full") == [25 + 6 * 16] * 8
    assert inspect_checkpoint(onevision, images=2).grids == ((5, 5), (1, 1)) * 2
    next_one = inspect_checkpoint(tiny_tiled("llava_next"), images=2, image_size=(90, 31))
    assert next_one.grids == ((6, 6), (18, 6), (18, 1)) * 2
    assert {part.name for part in next_one.parts} >= {"image_newline"}


def test_the_json_form_is_plain(converted: Path) -> None:
    data = json.loads(json.dumps(inspect_checkpoint(converted).to_dict()))
    assert data["decoder"]["num_layers"] == 8
    assert len(data["routes"][0]["layers"]) == 8
    assert data["pyramid"]["sites"][0]["after_layer"] == 1


CLIP, SIGLIP = (
    {
        "hidden_size": 1024, "intermediate_size": 4096, "model_type": "clip_vision_model", "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    },
    {
        "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model", "num_hidden_layers": 26,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
    },
)  # fmt: skip
HUB: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": hub_config(LAYOUTS["llava-1.5-7b-hf"], {}),
    "llava-1.5-13b": hub_config(LAYOUTS["llava-1.5-13b-hf"], {}),
    "llava-1.6-vicuna-7b": {
        "model_type": "llava_next", "image_token_index": 32000, "vision_config": CLIP,
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
    },
    "llava-1.6-mistral-7b": {
        "model_type": "llava_next", "image_token_index": 32000, "vision_config": CLIP,
        "text_config": {
            "model_type": "mistral", "max_position_embeddings": 32768, "vocab_size": 32064,
            "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": None,
        },
    },
    "llava-onevision-7b": {
        "model_type": "llava_onevision", "image_token_index": 151646, "video_token_index": 151647,
        "vision_config": SIGLIP,
        "text_config": {
            "model_type": "qwen2", "max_position_embeddings": 32768, "vocab_size": 152000, "hidden_size": 3584,
            "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "use_sliding_window": False,
        },
    },
}  # fmt: skip


def write_hub_processor(folder: Path, config: dict[str, Any]) -> None:
    """Write a processor's files as they are on the hub, with words of no meaning in the tokenizer."""
    kind, side = config["model_type"], config["vision_config"]["image_size"]
    square = {"height": side, "width": side}
    images: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": square,
        "size": {"shortest_edge": side},
    }
    settings: dict[str, Any] = {"processor_class": "LlavaProcessor"}
    if kind == "llava_onevision":
        images = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": square}
        settings = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 729}
        settings |= {"vision_feature_select_strategy": "full"}
    else:
        settings |= {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    if kind == "llava_next":
        images["image_processor_type"], settings["processor_class"] = "LlavaNextImageProcessor", "LlavaNextProcessor"
    image = config["image_token_index"]
    words = {"</s>" if i == 2 else f"word{i}": i for i in range(image)}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": token, "special": True, **plain}
        for token, i in (("</s>", 2), ("<image>", image), ("<pad>", image + 1))
    ]
    tokenizer = {
        "version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "word0"},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


@pytest.mark.parametrize(
    ("model", "tokens", "key_width", "sites"),
    [
        ("llava-1.5-7b", 24**2, 4096, [-1, 2, 7, 15, 23]),
        pytest.param("llava-1.5-13b", 24**2, 5120, [-1, 3, 9, 19, 29], marks=pytest.mark.slow),
        # a square of 672 pixels is four tiles beside the whole; every row of theirs ends with a newline
        pytest.param("llava-1.6-vicuna-7b", 24**2 + 48 * 49, 4096, [-1, 2, 7, 15, 23], marks=pytest.mark.slow),
        ("llava-1.6-mistral-7b", 24**2 + 48 * 49, 1024, [-1, 2, 7, 15, 23]),
        pytest.param("llava-onevision-7b", 27**2 + 54 * 55, 512, [-1, 2, 6, 13, 20], marks=pytest.mark.slow),
    ],
)
def test_the_models_of_the_hub_are_read_from_their_headers(
    tmp_path: Path, model: str, tokens: int, key_width: int, sites: list[int]
) -> None:
    config = HUB[model]
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = TEXT_MODELS[config["text_config"]["model_type"]].completed(config["text_config"])
    header, stop = {}, 0
    for name, shape in llava_tensors(config | {"text_config": text}).items():
        start, stop = stop, stop + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, stop]}
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + stop)  # a hole: it takes no disk
    write_hub_processor(tmp_path, config)

    found = inspect_checkpoint(tmp_path)
    assert not found.notes, "a processor as it is on the hub lacks nothing"
    assert set(visual_tokens(found, "full")) == {tokens}
    assert {layer.kv_bytes for layer in found.routes[0].layers} == {2 * (tokens + 64) * key_width * 2}
    plan = convert(str(tmp_path), output=tmp_path.parent / "never-written", dry_run=True)
    assert [site.after_layer for site in plan.pyramid.sites] == sites


@pytest.mark.parametrize("pyramid", [{}, {"version": 3}, {"version": 1}, [], {"version": 1, "sites": [3]}])
def test_a_damaged_pyramid_section_is_named(converted: Path, tmp_path: Path, pyramid: object) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    config = json.loads((converted / "config.json").read_text()) | {"pyramid": pyramid}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect_checkpoint(tmp_path)
