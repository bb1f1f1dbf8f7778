"""LLaVA-NeXT and LLaVA-OneVision with a pyramid: images of any size, cut into tiles."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    PreTrainedModel,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector
from typing_extensions import override

from dpn_cli.modeling.configuration import DpnLlavaNextConfig, DpnLlavaOnevisionConfig
from dpn_cli.modeling.salience import note_change
from dpn_cli.modeling.visual import PyramidModelMixin, with_salience
from dpn_cli.modeling.wrapper import PyramidGenerationMixin, rename_keys_as
from dpn_cli.pyramid.config import Block
from dpn_cli.pyramid.experts import Grid
from dpn_cli.pyramid.tiling import Tiling

NO_VIDEO = "a pyramid takes images, not videos: pass frames of the video as images, or use the original model"


class TiledModelMixin(PyramidModelMixin):
    """The inner model of a family that cuts images into tiles."""

    projector_class: type[nn.Module]  # the family's

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = self.projector_class(config)
        self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.vocab_size = config.text_config.vocab_size
        self.language_model = self.build_language_model()
        self.post_init()

    @override
    def pack_image_features(self, image_features: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the original's; salience is packed alike, with none for newlines."""
        pack, tiles = super().pack_image_features, [len(each) for each in image_features]
        without = {**kwargs, "image_newline": torch.zeros(1)}
        note_change(lambda salience: pack(salience.split(tiles), *args, **without)[0])
        return pack(image_features, *args, **kwargs)

    def image_grid(self) -> Grid:
        """Return the visual tokens of a whole image, (H, W)."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return side, side

    def image_blocks(
        self,
        num_images: int,
        image_sizes: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
    ) -> tuple[Block, ...]:
        """Return the visual grids of some images; where a sample has several, these are not cut (OneVision).

        Raises:
            ValueError: without image sizes.
        """
        if image_sizes is None:
            raise ValueError("the tiles of an image follow from its size: pass image_sizes, as the processor gives it")
        tiling = Tiling.of(self.config.to_dict(), self.image_grid()[0])
        counts = [1] * num_images if batch_num_images is None else batch_num_images.tolist()
        is_cut = [tiling.cuts_several or count == 1 for count in counts for _ in range(count)]
        blocks: tuple[Block, ...] = ()
        for size, cut in zip(torch.as_tensor(image_sizes).tolist(), is_cut, strict=True):
            blocks += tiling.blocks(*size) if cut else tiling.blocks_beside_others()
        return blocks


class DpnLlavaNextModel(TiledModelMixin, LlavaNextModel):
    """`LlavaNextModel` whose language model is a pyramid and is told where each visual token stands in its image."""

    config_class = DpnLlavaNextConfig
    projector_class = LlavaNextMultiModalProjector
    get_image_features = with_salience(LlavaNextModel.get_image_features)


class DpnLlavaNextForConditionalGeneration(PyramidGenerationMixin, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration` with a pyramid, routed per sample."""

    config_class = DpnLlavaNextConfig
    inner_class = DpnLlavaNextModel


class DpnLlavaOnevisionModel(TiledModelMixin, LlavaOnevisionModel):
    """`LlavaOnevisionModel` whose language model is a pyramid; it takes images, but no videos."""

    config_class = DpnLlavaOnevisionConfig
    projector_class = LlavaOnevisionMultiModalProjector
    get_image_features = with_salience(LlavaOnevisionModel.get_image_features)

    @override
    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse videos."""
        raise NotImplementedError(NO_VIDEO)


class DpnLlavaOnevisionForConditionalGeneration(PyramidGenerationMixin, LlavaOnevisionForConditionalGeneration):
    """`LlavaOnevisionForConditionalGeneration` with a pyramid, routed per sample; it takes images, but no videos."""

    config_class = DpnLlavaOnevisionConfig
    inner_class = DpnLlavaOnevisionModel

    @override
    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        if model_kwargs.get("pixel_values_videos") is not None:
            raise NotImplementedError(NO_VIDEO)
        super()._validate_model_kwargs(model_kwargs)


rename_keys_as("llava_next", DpnLlavaNextModel, DpnLlavaNextForConditionalGeneration)
rename_keys_as("llava_onevision", DpnLlavaOnevisionModel, DpnLlavaOnevisionForConditionalGeneration)
