"""The tensors that a LLaVA has: what they are named, and which ones a config asks for. No torch."""

from typing import Any

from dpn_cli.families.family import Family
from dpn_cli.families.text import TEXT_MODELS
from dpn_cli.families.vision import VISION_TOWERS
from dpn_cli.pyramid.shape import Shapes

# Where the decoder's tensors are: files of the hub, and files named as transformers 5 does in memory.
TEXT_PREFIXES = ("language_model.model.", "model.language_model.")

# The ends of the names of what is stored but is no weight: buffers of old versions, and the counter of torch's
# AveragedModel.
COMPUTED = (".rotary_emb.inv_freq", ".position_ids", "n_averaged")

# Tensor names of checkpoints on the hub → those of transformers 5 in memory; the first match counts.
RENAMES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("model.language_model.", "model.language_model."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.", "model.vision_tower."),
    ("model.multi_modal_projector.", "model.multi_modal_projector."),
    ("lm_head.", "lm_head."),
    ("image_newline", "model.image_newline"),
    ("model.image_newline", "model.image_newline"),
)


def memory_name(name: str) -> str | None:
    """Return a stored tensor's name as transformers 5 has it in memory; None if no LLaVA has such a tensor."""
    for old, new in RENAMES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def is_tied(config: dict[str, Any]) -> bool:
    """Say whether a LLaVA's head is its embedding."""
    return bool(config["text_config"].get("tie_word_embeddings") or config.get("tie_word_embeddings"))


def llava_tensors(config: dict[str, Any]) -> Shapes:
    """Return the hub's name and the shape of every tensor, from a complete config.json in Hugging Face's layout."""
    text, vision = config["text_config"], config["vision_config"]
    hidden, tower = text["hidden_size"], VISION_TOWERS[vision["model_type"]]
    layers = config.get("vision_feature_layer", -2)
    features = vision["hidden_size"] * (len(layers) if isinstance(layers, list) else 1)
    decoder = TEXT_MODELS[text.get("model_type", "llama")].tensors(text)
    shapes = {f"language_model.model.{name}": shape for name, shape in decoder.items()}
    shapes |= projector_tensors(features, hidden, config.get("multimodal_projector_bias", True))
    if not is_tied(config):
        shapes["language_model.lm_head.weight"] = (text["vocab_size"], hidden)
    if Family.of(config).cuts_images:
        shapes["image_newline"] = (hidden,)
    return shapes | {f"{tower.prefix}{name}": shape for name, shape in tower.tensors(vision).items()}


def projector_tensors(vision_hidden: int, text_hidden: int, bias: bool = True) -> Shapes:
    """Return what the projector between tower and decoder has."""
    shapes: Shapes = {
        "multi_modal_projector.linear_1.weight": (text_hidden, vision_hidden),
        "multi_modal_projector.linear_2.weight": (text_hidden, text_hidden),
    }
    if bias:
        shapes |= {f"multi_modal_projector.linear_{i}.bias": (text_hidden,) for i in (1, 2)}
    return shapes
