"""The processor of LLaVA-OneVision, for images alone."""

from typing import Any

from transformers import LlavaOnevisionProcessor


class OnevisionImages(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor without its part for videos, which needs torchvision and has no pyramid."""

    def __init__(  # transformers reads the names: of the parts, and of what else is stored
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        vision_aspect_ratio: str = "anyres_max_9",
        **unused: Any,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            vision_aspect_ratio=vision_aspect_ratio,
        )
