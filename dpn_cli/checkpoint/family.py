"""The families of models that can have a pyramid. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpn_cli.recipe import DEFAULT_RECIPE

CONVERTED = "dpn_"  # before a family's model type, in what dpn writes


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: of the originals.
        stem: what the names of our classes for it start with.
        select_strategy: the `vision_feature_select_strategy` of its configs where they say nothing.
        feature_layer: their `vision_feature_layer`, likewise.
        cuts_images: whether images are cut into tiles, with newline tokens.
        recipe: for its models that have none of their own.
    """

    model_type: str
    stem: str
    select_strategy: str = "default"
    feature_layer: int = -2
    cuts_images: bool = False
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


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava", "DpnLlava"),
        Family("llava_next", "DpnLlavaNext", cuts_images=True, recipe="llava-next"),
        Family(
            "llava_onevision",
            "DpnLlavaOnevision",
            select_strategy="full",
            feature_layer=-1,
            cuts_images=True,
            recipe="llava-onevision",
        ),
    )
}


def is_converted(config: Mapping[str, Any]) -> bool:
    """Say whether a config is one that dpn wrote."""
    return str(config.get("model_type")).startswith(CONVERTED)
