"""The classes of every family; an export's one file is made from here."""

from transformers import PreTrainedConfig

from dpn_cli.modeling.configuration import DpnLlavaConfig, DpnLlavaNextConfig, DpnLlavaOnevisionConfig
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration
from dpn_cli.modeling.tiled import DpnLlavaNextForConditionalGeneration, DpnLlavaOnevisionForConditionalGeneration
from dpn_cli.modeling.wrapper import PyramidGenerationMixin

MODELS: dict[type[PreTrainedConfig], type[PyramidGenerationMixin]] = {
    DpnLlavaConfig: DpnLlavaForConditionalGeneration,
    DpnLlavaNextConfig: DpnLlavaNextForConditionalGeneration,
    DpnLlavaOnevisionConfig: DpnLlavaOnevisionForConditionalGeneration,
}
