"""Dynamic pyramids for LLaVA: convert, calibrate, export. Importing this package imports no torch."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load a converted or exported checkpoint as a `DpnLlavaForConditionalGeneration`.

    Args:
        path: a folder that `dpn convert` or `dpn export` wrote.
        kwargs: passed on to `from_pretrained`.
    """
    from dpn_cli.modeling.loading import load as load_model

    return load_model(path, **kwargs)
