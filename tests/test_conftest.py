"""The tiny checkpoint is what transformers takes for a real one."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("text", "layout", "shards"),
    [("llama", "hub", 1), ("llama", "new", 2), ("mistral", "hub", 2), ("qwen2", "new", 1)],
)
def test_tiny_llava_loads_whole_and_sees_the_picture(
    tiny_llava_factory: Callable[..., Path], text: str, layout: str, shards: int
) -> None:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = tiny_llava_factory(text=text, layout=layout, shards=shards)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.text_config.model_type == text

    processor = AutoProcessor.from_pretrained(folder)
    message = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What colour is this?"}],
    }
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 48, 48, 3), dtype=np.uint8)
    batch = processor(
        text=[prompt] * 2, images=[[Image.fromarray(p)] for p in pixels], return_tensors="pt", padding=True
    )
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [144, 144]
    with torch.no_grad():
        logits = model(**batch, logits_to_keep=1).logits
    assert (logits[0] - logits[1]).abs().max() > 0.1
