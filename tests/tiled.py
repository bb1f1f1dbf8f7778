"""Tiny random models that cut images into tiles: LLaVA-NeXT and LLaVA-OneVision, stock and with a pyramid."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, SiglipVisionConfig

from dpn_cli.inference.onevision_processor import OnevisionImages
from dpn_cli.modeling.families import MODELS
from dpn_cli.pyramid.config import DPE_PARTS
from dpn_cli.pyramid.experts import num_tokens
from tests.conftest import CHAT_TEMPLATE, hub_name, tiny_text_config, tiny_tokenizer
from tests.pyramids import pyramid

TILE, PATCH = {"llava_next": 24, "llava_onevision": 20}, 4  # pixels; whole images are 6×6 and 5×5 tokens
STEMS = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": PATCH,
}  # fmt: skip

VIDEO_TOKEN = "word9"

Sizes = Sequence[tuple[int, int]]  # height and width of every image


@pytest.fixture(scope="session")
def tiny_tiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `make(family, text="llama", layout="hub") -> Path`, a checkpoint; equal arguments give the same folder."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(family: str, text: str = "llama", layout: str = "hub") -> Path:
        key = (family, text, layout)
        if key not in made:
            made[key] = _save(tmp_path_factory.mktemp("-".join(key)), family, text, layout)
        return made[key]

    return make


def _save(folder: Path, family: str, text: str, layout: str) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{STEMS[family]}ForConditionalGeneration")(_config(family, text))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    rename = {"hub": hub_name, "new": str}[layout]
    tensors = {rename(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _save_processor(folder, family)
    return folder


def _config(family: str, text: str) -> Any:
    side = TILE[family]
    common = {
        "text_config": tiny_text_config(text),  # type: ignore[arg-type]
        "image_token_index": 4,
        "initializer_range": 0.2,
    }
    if family == "llava_next":
        vision: Any = CLIPVisionConfig(**VISION, image_size=side, projection_dim=32, initializer_factor=4.0)
        shapes = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
        pixels = [[side * rows, side * cols] for rows, cols in shapes]
        return transformers.LlavaNextConfig(vision_config=vision, image_grid_pinpoints=pixels, **common)
    vision = SiglipVisionConfig(**VISION, image_size=side, vision_use_head=False)
    pixels = [[side * rows, side * cols] for rows in range(1, 5) for cols in range(1, 5)]
    return transformers.LlavaOnevisionConfig(
        vision_config=vision, image_grid_pinpoints=pixels, vision_aspect_ratio="anyres_max_4",
        video_token_index=tiny_tokenizer().convert_tokens_to_ids(VIDEO_TOKEN), **common,
    )  # fmt: skip


def _save_processor(folder: Path, family: str) -> None:
    side, pixels = TILE[family], _config(family, "llama").image_grid_pinpoints
    if family == "llava_next":
        processor: Any = transformers.LlavaNextProcessor(
            transformers.LlavaNextImageProcessorPil(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pixels
            ),
            tiny_tokenizer(),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            chat_template=CHAT_TEMPLATE,
            num_additional_image_tokens=1,
        )
    else:  # the stock one needs torchvision
        processor = OnevisionImages(
            transformers.LlavaOnevisionImageProcessorPil(
                size={"height": side, "width": side}, image_grid_pinpoints=pixels
            ),
            tiny_tokenizer(video_token=VIDEO_TOKEN),
            num_image_tokens=(side // PATCH) ** 2,
            vision_feature_select_strategy="full",
            chat_template=CHAT_TEMPLATE,
            vision_aspect_ratio="anyres_max_4",
        )
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text()) | {"processor_class": f"{STEMS[family]}Processor"}
    if family == "llava_onevision":
        size = {"height": side, "width": side}
        settings["video_processor"] = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": size}
    path.write_text(json.dumps(settings))


@pytest.fixture
def make_tiled_pair(tiny_tiled: Callable[..., Path]) -> Callable[..., tuple[Any, Any]]:
    """Return `make(family, text, layout, attn, **pyramid changes) -> (stock model, pyramid model)`."""

    def make(
        family: str, text: str = "llama", layout: str = "hub", attn: str = "sdpa", **changes: Any
    ) -> tuple[Any, Any]:
        folder = tiny_tiled(family, text, layout)
        stock = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attn).eval()
        settings = stock.config.to_dict() | {"model_type": f"dpn_{family}"}
        [(config_class, model_class)] = [each for each in MODELS.items() if each[0].model_type == f"dpn_{family}"]
        config = config_class.from_dict(settings)
        config.pyramid = pyramid(**{"min_visual_tokens": 4, **changes}).to_dict()
        model, info = model_class.from_pretrained(
            folder, config=config, attn_implementation=attn, output_loading_info=True
        )
        assert not info["unexpected_keys"]
        assert all(any(part in key for part in DPE_PARTS) for key in info["missing_keys"])
        torch.manual_seed(4)  # of the first two dozen, the one whose routers disagree most
        for name, parameter in model.named_parameters():
            if "routers" in name:
                torch.nn.init.normal_(parameter, std=1.0)
        return stock, model.eval()

    return make


def tiled_prompt(model: Any, sizes: Sizes, before: int, after: int, seed: int) -> dict[str, torch.Tensor]:
    """Return one sample as the family's processor would: `before` words, images of these sizes, `after` words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(6, 300, (before + after,), generator=generator).tolist()
    sample: dict[str, torch.Tensor] = {}
    count = 0
    if sizes:
        sample["image_sizes"] = torch.tensor(sizes)
        if model.config.model_type.endswith("onevision"):
            sample["batch_num_images"] = torch.tensor([len(sizes)])
        count = num_tokens(model.model.image_grids(len(sizes), **sample))
        side = model.config.vision_config.image_size
        patches = 1 + max(len(pins) for pins in model.config.image_grid_pinpoints) * 8  # more than any image has
        sample["pixel_values"] = torch.randn(len(sizes), patches, 3, side, side, generator=generator)
    ids = [1, *words[:before], *[4] * count, *words[before:]]
    return {"input_ids": torch.tensor([ids]), **sample}


def collate_tiled(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad samples on the left into one batch."""
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    gaps = [longest - sample["input_ids"].shape[1] for sample in samples]
    rows = [sample["input_ids"] for sample in samples]
    pad = torch.nn.functional.pad
    batch = {
        "input_ids": torch.cat([pad(row, (gap, 0), value=3) for row, gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.cat([pad(torch.ones_like(row), (gap, 0)) for row, gap in zip(rows, gaps, strict=True)]),
    }
    for name in ("pixel_values", "image_sizes", "batch_num_images"):
        if tensors := [sample[name] for sample in samples if name in sample]:
            batch[name] = torch.cat(tensors)
    return batch
