"""Another tiny LLaVA with the same tokenizer, larger images in coarser patches, fewer layers and a longer prompt."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests.conftest import CHAT_TEMPLATE, tiny_text_config, tiny_tokenizer

SIDE, PATCH, ROWS = 56, 8, 320
SYSTEM = "describe the picture ."


@pytest.fixture(scope="session")
def other_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, which nobody may change."""
    folder = tmp_path_factory.mktemp("other") / "other-llava"
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=32, initializer_factor=4.0,
    )  # fmt: skip
    text = tiny_text_config("llama")
    text.num_hidden_layers, text.vocab_size = 4, ROWS
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=4, image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    write_processor(folder, tiny_tokenizer())
    return folder


@pytest.fixture
def with_tokenizer(other_llava: Path, tmp_path: Path) -> Callable[[Any], Path]:
    """Return `make(tokenizer) -> Path`, a copy of the checkpoint with another tokenizer."""

    def make(tokenizer: Any) -> Path:
        folder = Path(shutil.copytree(other_llava, tmp_path / "other-words"))
        write_processor(folder, tokenizer)
        return folder

    return make


def write_processor(folder: Path, tokenizer: Any) -> None:
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=f"{SYSTEM} {CHAT_TEMPLATE}",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
