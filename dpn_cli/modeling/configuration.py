"""The configurations of LLaVAs whose language model is a pyramid."""

from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig
from typing_extensions import override

from dpn_cli.modeling.code import auto_map, write_code
from dpn_cli.pyramid.config import PyramidConfig


class PyramidSection:
    """The section `pyramid` of a config (see `PyramidConfig`); without it nothing is pooled."""

    pyramid: dict[str, Any] | None

    def pyramid_config(self) -> PyramidConfig:
        """Return the `pyramid` section as a dataclass.

        Raises:
            ValueError: if the section is not one that this version reads.
        """
        return PyramidConfig(sites=()) if self.pyramid is None else PyramidConfig.from_dict(self.pyramid)

    @override
    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:  # type: ignore[misc]
        """Save as transformers does, and the code with it, which models and configs load with elsewhere."""
        self.auto_map = auto_map(type(self).__name__.removesuffix("Config"))
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        write_code(Path(save_directory))


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
