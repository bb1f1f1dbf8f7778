"""The families of models that can have a pyramid. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpn_cli.pyramid.recipe import DEFAULT_RECIPE

CONVERTED = "dpn_"  # before a family's model type, in what dpn writes


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: of the originals.
        stem: what the names of our classes for it start with.
        select_strategy: the `vision_feature_select_strategy` of its configs where they say nothing.
        feature_layer: their `vision_feature_layer`, likewise.
        image_processor: the class that prepares its images where nothing says which.
        video_processor: the class that its processors have for videos, or None; stock ones do not load without.
        cuts_images: whether images are cut into tiles, with newline tokens; no other image processor does this.
        counts_tokens: whether the processor is told the number of tokens of a tile, in place of the size of a patch.
        recipe: for its models that have none of their own.
    """

    model_type: str
    stem: str
    select_strategy: str = "default"
    feature_layer: int = -2
    image_processor: str = "LlavaImageProcessor"
    video_processor: str | None = None
    cuts_images: bool = False
    counts_tokens: bool = False
    recipe: str = DEFAULT_RECIPE

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
        Family("llava", "DpnLlava"),
        Family(
            "llava_next",
            "DpnLlavaNext",
            image_processor="LlavaNextImageProcessor",
            cuts_images=True,
            recipe="llava-next",
        ),
        Family(
            "llava_onevision",
            "DpnLlavaOnevision",
            select_strategy="full",
            feature_layer=-1,
            image_processor="LlavaOnevisionImageProcessor",
            video_processor="LlavaOnevisionVideoProcessor",
            cuts_images=True,
            counts_tokens=True,
            recipe="llava-onevision",
        ),
    )
}


def is_converted(config: Mapping[str, Any]) -> bool:
    """Say whether a config is one that dpn wrote."""
    return str(config.get("model_type")).startswith(CONVERTED)
