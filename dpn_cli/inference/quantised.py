"""The frozen model in 4 or 8 bits (bitsandbytes): calibration on small cards, and on the CPU.

Only the decoder's linear layers are quantised. The routers that are fitted on top are stored into the converted
folder, whose weights stay as they are.
"""

from typing import Any, Literal

import torch

from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.quantisation import SKIPPED
from dpn_cli.inference.adapter import hush_bitsandbytes
from dpn_cli.inference.loading import load_opened
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import PyramidConfig


def load_frozen(
    source: Checkpoint,
    pyramid: PyramidConfig,
    load_in: Literal["4bit", "8bit"] | None,
    dtype: str | torch.dtype = "auto",
    healed: bool = False,
    **kwargs: Any,
) -> PyramidGenerationMixin:
    """Load a converted checkpoint, as it was before any healing, its decoder quantised if asked.

    Args:
        source: a checkpoint that `dpn convert` wrote.
        pyramid: the checkpoint's pyramid.
        load_in: bits per weight; None leaves the weights as they are.
        dtype: dtype of the computation, and of what is not quantised.
        healed: whether to load what healing has trained, too.
        **kwargs: arguments of `load_opened`.

    Raises:
        CheckpointError: as `load_model`.
    """
    if load_in is None:
        return load_opened(source, pyramid, dtype, healed=healed, **kwargs)
    from transformers import BitsAndBytesConfig

    hush_bitsandbytes()
    config = BitsAndBytesConfig(
        load_in_4bit=load_in == "4bit",
        load_in_8bit=load_in == "8bit",
        llm_int8_skip_modules=SKIPPED,
        bnb_4bit_quant_type="nf4",
    )
    model = load_opened(source, pyramid, dtype, healed=healed, quantization_config=config, **kwargs)
    _settle(model)
    return model


def _settle(model: PyramidGenerationMixin) -> None:
    """Let 4-bit layers compute in the model's dtype, and keep their weights as they are packed now.

    On CPUs with AVX512-BF16, bitsandbytes repacks each weight in place in the first forward pass without gradients,
    and from then on gradients are silently wrong.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = model.dtype
