"""Opening converted and exported checkpoints, with nothing left to chance."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from dpn_cli.errors import CheckpointError
from dpn_cli.modeling.configuration import DpnLlavaConfig
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration, DpnLlavaModel


def register() -> None:
    """Teach transformers' Auto classes the model type `dpn_llava`."""
    AutoConfig.register(DpnLlavaConfig.model_type, DpnLlavaConfig, exist_ok=True)
    AutoModel.register(DpnLlavaConfig, DpnLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(DpnLlavaConfig, DpnLlavaForConditionalGeneration, exist_ok=True)


def load_model(folder: Path, dtype: str = "auto", **kwargs: Any) -> DpnLlavaForConditionalGeneration:
    """Load a converted or exported checkpoint, in eval mode.

    Args:
        folder: the checkpoint.
        dtype: `auto` for the checkpoint's own, or a torch dtype's name.
        **kwargs: for `from_pretrained`, e.g. `device_map`, `attn_implementation`.

    Raises:
        CheckpointError: if the tensors on disk are not exactly those of the model.
    """
    model, info = DpnLlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True, **kwargs
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[what])):
            raise CheckpointError(
                f"{folder}: {len(keys)} {what.replace('_', ' ')}, such as {keys[0]}; the folder is not a whole "
                "checkpoint: convert it again"
            )
    return model.eval()  # type: ignore[no-any-return]


register()
