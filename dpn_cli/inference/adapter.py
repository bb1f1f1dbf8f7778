"""LoRA adapters on the decoder layers after the first site, through peft (the extra `heal`).

peft's own functions are called, since those of transformers' models take only peft's latest release.
"""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dpn_cli.checkpoint.lora import WEIGHTS_FILE, Lora
from dpn_cli.errors import CheckpointError, MissingExtraError
from dpn_cli.modeling.wrapper import PyramidGenerationMixin

NAME = "default"  # peft's, of the one adapter that a model has


def add_adapter(
    model: PyramidGenerationMixin, rank: int, alpha: float, target_modules: Sequence[str], seed: int
) -> dict[str, nn.Parameter]:
    """Put a fresh adapter, which changes nothing yet, on the layers after the first site; freeze all else.

    Args:
        model: a converted model, possibly in 4 or 8 bits.
        rank: the adapter's rank.
        alpha: the adapter's output is scaled by alpha / rank.
        target_modules: names of linear layers, such as `q_proj`.
        seed: random seed for the initial values.

    Returns:
        The trainable parameters by name, in float32.

    Raises:
        MissingExtraError: if peft is not installed.
    """
    peft = _peft()
    text_model: Any = model.text_model
    layers = range(text_model.segments[0].stop, len(text_model.layers))
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        # A pattern of whole names: the vision tower has layers and projections of the same names.
        target_modules=rf"model\.language_model\.layers\.({'|'.join(map(str, layers))})"
        rf"\.\w+\.({'|'.join(target_modules)})",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, NAME)
    model.eval()  # what is new came in training mode
    return adapter_parameters(model)


def remove_adapter(model: PyramidGenerationMixin) -> None:
    """Take the adapter off a model, which is then what it was before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _peft().tuners.tuners_utils.BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return an adapter's parameters by their names in the model, cast to float32 in place."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


def save_adapter(model: PyramidGenerationMixin, folder: Path) -> None:
    """Write the adapter in peft's format into a new folder."""
    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = None, True
    folder.mkdir()
    tensors = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": parameter.detach().cpu().contiguous()
        for name, parameter in adapter_parameters(model).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)


def load_adapter(model: PyramidGenerationMixin, lora: Lora) -> None:
    """Put a saved adapter on a model, for inference.

    peft's own file says no more than its rank and scale: patterns and paths in it, which may be a stranger's, are not
    looked at.

    Raises:
        CheckpointError: if it is not this model's.
        MissingExtraError: if peft is not installed.
    """
    peft = _peft()
    targets = [name.removesuffix(".weight") for name in sorted(lora.targets)]
    folder = lora.folder
    try:
        config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
        peft.inject_adapter_in_model(config, model, NAME)
    except ValueError as error:
        raise CheckpointError(f"the adapter in {folder} does not fit the model ({error}): calibrate it again") from None
    parameters = adapter_parameters(model)
    stored = load_file(folder / WEIGHTS_FILE)
    expected = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": name for name in parameters}
    if {key: value.shape for key, value in stored.items()} != {k: parameters[n].shape for k, n in expected.items()}:
        raise CheckpointError(f"the tensors in {folder} are not those of an adapter of this model: calibrate it again")
    for key, name in expected.items():
        parameters[name].data.copy_(stored[key])
        parameters[name].requires_grad_(False)


def hush_bitsandbytes() -> None:
    """Keep bitsandbytes, which peft imports, from warning about an optional kernel that is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def require_peft() -> None:
    """Check that peft is installed.

    Raises:
        MissingExtraError: if it is not.
    """
    if find_spec("peft") is None:
        raise MissingExtraError("a healed model (--heal lora)", "peft", "heal")


def _peft() -> Any:
    require_peft()
    hush_bitsandbytes()
    import peft

    return peft
