from typing import Any

import pytest

from dpn_cli.families.tensors import llava_tensors, memory_name

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "head_dim": 24,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 48,
    "patch_size": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "vision", "options"),
    [
        ({"model_type": "mistral"}, {"model_type": "clip_vision_model"}, {"model_type": "llava_next"}),
        (
            {"model_type": "qwen2", "tie_word_embeddings": True},
            {"model_type": "siglip_vision_model", "vision_use_head": False},
            {"model_type": "llava_onevision", "tie_word_embeddings": True},
        ),
        ({"model_type": "llama"}, {"model_type": "clip_vision_model"}, {}),
        ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, {"model_type": "clip_vision_model"}, {}),
        ({"model_type": "mistral"}, {"model_type": "clip_vision_model"}, {"multimodal_projector_bias": False}),
        ({"model_type": "qwen2"}, {"model_type": "siglip_vision_model"}, {"vision_feature_layer": [-2, -1]}),
        ({"model_type": "llama"}, {"model_type": "siglip_vision_model", "vision_use_head": False}, {}),
    ],
)
def test_the_tensors_are_those_of_transformers(
    text: dict[str, Any], vision: dict[str, Any], options: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, vision, options = TEXT | text, VISION | vision, {"model_type": "llava"} | options
    config = AutoConfig.for_model(
        text_config=AutoConfig.for_model(**text), vision_config=AutoConfig.for_model(**vision), **options
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if options.get("tie_word_embeddings"):
        del expected["lm_head.weight"]
    found = llava_tensors({"text_config": text, "vision_config": vision, **options})
    assert {memory_name(name): shape for name, shape in found.items()} == expected
