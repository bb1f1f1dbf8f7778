"""The configurations of LLaVAs whose language model is a pyramid."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig

from dpn_cli.modeling.pyramid_config import PyramidConfig


class PyramidSection:
    """The section `pyramid` of a config (see `PyramidConfig`); without it nothing is pooled."""

    pyramid: dict[str, Any] | None

    def pyramid_config(self) -> PyramidConfig:
        """Return the `pyramid` section as a dataclass.

        Raises:
            ValueError: if the section is not one that this version reads.
        """
        return PyramidConfig(sites=()) if self.pyramid is None else PyramidConfig.from_dict(self.pyramid)


@strict
class DpnLlavaConfig(PyramidSection, LlavaConfig):
    """A `LlavaConfig` plus the section `pyramid`."""

    model_type = "dpn_llava"

    pyramid: dict[str, Any] | None = None


@strict
class DpnLlavaNextConfig(PyramidSection, LlavaNextConfig):
    """A `LlavaNextConfig` plus the section `pyramid`."""

    model_type = "dpn_llava_next"

    pyramid: dict[str, Any] | None = None


@strict
class DpnLlavaOnevisionConfig(PyramidSection, LlavaOnevisionConfig):
    """A `LlavaOnevisionConfig` plus the section `pyramid`."""

    model_type = "dpn_llava_onevision"

    pyramid: dict[str, Any] | None = None
