"""Dynamic pyramids for LLaVA: convert, calibrate, export. Importing this package imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpn_cli.modeling.wrapper import PyramidGenerationMixin

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(model: str | Path, **kwargs: Any) -> "PyramidGenerationMixin":
    """Load a converted or exported checkpoint, in eval mode.

    Args:
        model: a folder that `dpn convert` or `dpn export` wrote, or a hub id of one.
        **kwargs: `dtype`, and what `from_pretrained` takes (`device_map`, `attn_implementation`).

    Raises:
        CheckpointError: if it is missing or not converted, or its tensors are not exactly the model's.
    """
    from dpn_cli.checkpoint.source import resolve_source
    from dpn_cli.inference.loading import load_model

    return load_model(resolve_source(str(model)).path, **kwargs)
