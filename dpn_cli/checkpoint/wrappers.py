"""What training leaves in tensors and their names, and what the model itself calls them. No torch."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from dpn_cli.checkpoint.headers import TensorInfo
from dpn_cli.errors import CheckpointError
from dpn_cli.families.tensors import TEXT_PREFIXES

EMBEDDING = "embed_tokens.weight"

# Of PyTorch's wrappers (DistributedDataParallel, torch.compile, FSDP, checkpointing), anywhere in a name.
_PARTS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_EMBEDDINGS = tuple(f"{prefix}{EMBEDDING}" for prefix in (*TEXT_PREFIXES, "model."))  # the last is LLaVA's own layout
_ADAPTERS = {"lora_A", "lora_B", "base_layer", "modules_to_save", "original_module"}  # peft's


def unwrap(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """Return what the model itself calls its tensors, by their stored names, and what was taken off, for a message.

    What every name begins with, whatever it is, is taken off where one of LLaVA's layouts begins after it.
    """
    own = {name: ".".join(part for part in name.split(".") if part not in _PARTS) for name in names}
    found = [f"{part}." for part in _PARTS if any(part in name.split(".") for name in own)]
    if prefix := _shared_prefix({*own.values()}):
        own = {name: new.removeprefix(prefix) for name, new in own.items()}
        found.append(prefix)
    return own, ", ".join(found)


def refuse_unfinished(tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Refuse a checkpoint that was saved with an adapter in the model, or without the parts of other processes.

    Raises:
        CheckpointError: if a tensor's name, or that the embedding is empty, says so.
    """
    if name := next((name for name, each in tensors.items() if name.endswith(EMBEDDING) and not each.num_values), None):
        raise CheckpointError(
            f"{folder} holds {name!r} without its values, which DeepSpeed's ZeRO-3 had not gathered: save the model "
            "again, with stage3_gather_16bit_weights_on_model_save or by zero_to_fp32.py"
        )
    if name := next((name for name in tensors if not _ADAPTERS.isdisjoint(name.split("."))), None):
        raise CheckpointError(
            f"{folder} was saved with an unmerged adapter in it ({name}): merge it first, with peft's "
            "`merge_and_unload()`, and save the model again"
        )


def _shared_prefix(names: Collection[str]) -> str:
    for embedding in _EMBEDDINGS:
        if embedding in names:
            return ""
        for name in names:
            prefix = name.removesuffix(embedding)
            if prefix != name and prefix.endswith(".") and all(each.startswith(prefix) for each in names):
                return prefix
    return ""
