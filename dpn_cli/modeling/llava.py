"""LLaVA with a pyramid: the classes that transformers loads, saves and generates with."""

import math

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, LlavaForConditionalGeneration, LlavaModel, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from dpn_cli.modeling.configuration import DpnLlavaConfig
from dpn_cli.modeling.hr_tower import LlavaHrVisionConfig, LlavaHrVisionModel
from dpn_cli.modeling.salience import note_change
from dpn_cli.modeling.visual import PyramidModelMixin, with_salience
from dpn_cli.modeling.wrapper import PyramidGenerationMixin, rename_keys_as
from dpn_cli.pyramid.experts import Grid


class Prepooling(LlavaMultiModalProjector):
    """LLaVA's projector, on the averages of small squares of the vision tower's features."""

    def __init__(self, config: DpnLlavaConfig, side: int) -> None:
        super().__init__(config)
        self.side = side

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Project features [images, tokens, width]."""
        note_change(self._pooled)
        return super().forward(self._pooled(image_features))

    def _pooled(self, values: torch.Tensor) -> torch.Tensor:
        """Return the averages of values [images, tokens, width]."""
        height = math.isqrt(values.shape[1])
        grids = values.transpose(1, 2).unflatten(2, (height, height))
        return F.avg_pool2d(grids, self.side).flatten(2).transpose(1, 2)


class DpnLlavaModel(PyramidModelMixin, LlavaModel):
    """`LlavaModel` whose language model is a pyramid and is told where each visual token stands in its image."""

    config_class = DpnLlavaConfig
    get_image_features = with_salience(LlavaModel.get_image_features)

    def __init__(self, config: DpnLlavaConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        side = config.pyramid_config().prepooling
        self.multi_modal_projector = LlavaMultiModalProjector(config) if side == 1 else Prepooling(config, side)
        self.language_model = self.build_language_model()
        self.post_init()

    def image_grid(self) -> Grid:
        """Return the visual tokens of a whole image, (H, W)."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.language_model.pyramid.prepooling
        return side, side


class DpnLlavaForConditionalGeneration(PyramidGenerationMixin, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with a pyramid, routed per sample."""

    config_class = DpnLlavaConfig
    inner_class = DpnLlavaModel


rename_keys_as("llava", DpnLlavaModel, DpnLlavaForConditionalGeneration)

# LLaVA-HR is a LLaVA with another vision tower.
AutoConfig.register(LlavaHrVisionConfig.model_type, LlavaHrVisionConfig, exist_ok=True)
AutoModel.register(LlavaHrVisionConfig, LlavaHrVisionModel, exist_ok=True)
