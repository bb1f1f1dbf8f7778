"""Dynamic pyramids for LLaVA: convert, calibrate, export. Importing this package imports no torch."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpn_cli.modeling.wrapper import PyramidGenerationMixin

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


_OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only")
_REFUSED = ("config", "ignore_mismatched_sizes", "output_loading_info", "state_dict", "subfolder", "variant")


def load(model: str | Path, **kwargs: Any) -> "PyramidGenerationMixin":
    """Load a converted or exported checkpoint, in eval mode.

    Args:
        model: a folder that `dpn convert` or `dpn export` wrote, or a hub id of one.
        **kwargs: `dtype`, and what `from_pretrained` takes: where to find a model of the hub (`revision`,
            `cache_dir`, `token`, `local_files_only`), and how to run it (`device_map`, `attn_implementation`).

    Raises:
        CheckpointError: if it is missing or not converted, or its tensors are not exactly the model's.
        TypeError: for arguments that would load another model than the checkpoint is.
    """
    from dpn_cli.checkpoint.source import resolve_source
    from dpn_cli.inference.loading import load_model

    if refused := [name for name in _REFUSED if name in kwargs]:
        raise _not_taken(", ".join(refused))
    if "torch_dtype" in kwargs:
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    hub = {name: value for name in _OF_THE_HUB if (value := kwargs.pop(name, None)) is not None}
    try:
        return load_model(resolve_source(str(model), **hub).path, **kwargs)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in kwargs:
            raise
        raise _not_taken(unknown[1]) from None


def _not_taken(names: str) -> TypeError:
    return TypeError(
        f"dpn_cli.load takes no {names}: it loads a checkpoint as it is; AutoModelForImageTextToText.from_pretrained "
        "takes what changes its config.json, with trust_remote_code=True for an export"
    )
