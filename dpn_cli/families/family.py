"""The families of models that can have a pyramid. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_RECIPE = "llava-1.5-7b"
CONVERTED = "dpn_"  # before a family's model type, in what dpn writes


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: model type of the originals.
        stem: how the names of our classes for it begin.
        select_strategy: the `vision_feature_select_strategy` of configs that do not state it.
        feature_layer: the `vision_feature_layer` of configs that do not state it.
        vision_tower: the model type of a vision tower that names none.
        image_processor: the class that prepares images if nothing says which.
        video_processor: the class that its processors have for videos, or None; stock processors do not load without
            it.
        cuts_images: whether images are cut into tiles, with newline tokens; no other image processor does this.
        counts_tokens: whether the processor is told the number of tokens of a tile, in place of the size of a patch.
        plain_tokenizer: whether transformers takes the tokenizer.json of the originals as it is, whatever class of
            tokenizer they name (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`).
        recipe: name of the recipe for models that have none of their own.
        aliases: hub ids by short name.
    """

    model_type: str
    stem: str
    select_strategy: str = "default"
    feature_layer: int = -2
    vision_tower: str = "clip_vision_model"
    image_processor: str = "LlavaImageProcessor"
    video_processor: str | None = None
    cuts_images: bool = False
    counts_tokens: bool = False
    plain_tokenizer: bool = False
    recipe: str = DEFAULT_RECIPE
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Family":
        """Return the family that a config is of, converted or not.

        Raises:
            KeyError: if it is of no such family.
        """
        return FAMILIES[str(config.get("model_type")).removeprefix(CONVERTED)]

    @property
    def converted_type(self) -> str:
        """The model type of converted checkpoints."""
        return CONVERTED + self.model_type

    @property
    def architecture(self) -> str:
        """The class that loads a converted checkpoint."""
        return f"{self.stem}ForConditionalGeneration"

    @property
    def processor(self) -> str:
        """The class of its processors, which is the originals'."""
        return f"{self.stem.removeprefix('Dpn')}Processor"


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llava",
            "DpnLlava",
            plain_tokenizer=True,
            aliases={
                "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
                "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
                "bakllava": "llava-hf/bakLlava-v1-hf",
                "llava-llama-3-8b": "xtuner/llava-llama-3-8b-v1_1-transformers",
                "llava-hr-7b": "favor123/llava-hr-7b-sft-1024",
                "llava-hr-x-13b": "favor123/llava-hr-13b-x-sft-1024",
            },
        ),
        Family(
            "llava_next",
            "DpnLlavaNext",
            image_processor="LlavaNextImageProcessor",
            cuts_images=True,
            plain_tokenizer=True,
            recipe="llava-next",
            aliases={
                "llava-1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
                "llava-1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
            },
        ),
        Family(
            "llava_onevision",
            "DpnLlavaOnevision",
            select_strategy="full",
            feature_layer=-1,
            vision_tower="siglip_vision_model",
            image_processor="LlavaOnevisionImageProcessor",
            video_processor="LlavaOnevisionVideoProcessor",
            cuts_images=True,
            counts_tokens=True,
            recipe="llava-onevision",
            aliases={"llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf"},
        ),
    )
}

ALIASES = {alias: repo_id for family in FAMILIES.values() for alias, repo_id in family.aliases.items()}

# What transformers' image processors assume where a key is missing; they pad to a square if told by do_pad.
_OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_STANDARD = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_COMMON = {
    "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
}  # fmt: skip
_CLIP = {**_COMMON, **_OPENAI, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
_CLIP["size"] = {"shortest_edge": 224}
IMAGE_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
    "LlavaImageProcessor": {**_CLIP, "do_pad": False},
    "LlavaNextImageProcessor": {**_CLIP, "do_pad": True},
    "LlavaOnevisionImageProcessor": {**_COMMON, **_OPENAI, "size": {"height": 384, "width": 384}, "do_pad": True},
    "SiglipImageProcessor": {**_COMMON, **_STANDARD, "size": {"height": 224, "width": 224}},
    "ViTImageProcessor": {**_COMMON, **_STANDARD, "size": {"height": 224, "width": 224}, "resample": 2},
}


def is_converted(config: Mapping[str, Any]) -> bool:
    """Say whether a config is one that dpn wrote."""
    return str(config.get("model_type")).startswith(CONVERTED)
