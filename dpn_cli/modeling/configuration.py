"""The configuration of a LLaVA whose language model is a pyramid."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from dpn_cli.modeling.pyramid_config import PyramidConfig


@strict
class DpnLlavaConfig(LlavaConfig):
    """A `LlavaConfig` plus the section `pyramid` (see `PyramidConfig`); without it nothing is pooled."""

    model_type = "dpn_llava"

    pyramid: dict[str, Any] | None = None

    def pyramid_config(self) -> PyramidConfig:
        """Return the `pyramid` section as a dataclass.

        Raises:
            ValueError: if the section is not one that this version reads.
        """
        return PyramidConfig(sites=()) if self.pyramid is None else PyramidConfig.from_dict(self.pyramid)
