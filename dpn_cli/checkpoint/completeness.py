"""Is every tensor of a LLaVA there, once, in its shape? transformers draws a missing one at random. No torch."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from dpn_cli.checkpoint.blame import keys, without
from dpn_cli.checkpoint.headers import Checkpoint, check_float
from dpn_cli.checkpoint.layout import LlavaLayout, impossible
from dpn_cli.errors import CheckpointError
from dpn_cli.families.family import Family
from dpn_cli.families.tensors import COMPUTED, is_tied, llava_tensors, memory_name
from dpn_cli.families.vision import VISION_TOWERS
from dpn_cli.pyramid.shape import Shapes

_NONE = "no such tensor"


def check_complete(checkpoint: Checkpoint, layout: LlavaLayout, added: Shapes) -> None:
    """Check the tensors of a LLaVA, in either of Hugging Face's layouts, against its architecture.

    Args:
        checkpoint: the LLaVA, as it is stored or as it will be.
        layout: the checkpoint's layout.
        added: the pyramid's tensors, where it has one.

    Raises:
        CheckpointError: if a tensor is missing, stored twice, unknown, of another shape, or not of floating-point
            numbers.
    """
    found = _found(checkpoint)
    if (wrong := _first_wrong(checkpoint, layout, added, found)) is None:
        return
    name, wanted, stored = wrong
    says = f"asks for {wanted}, the weights have {stored}: {name!r}, in transformers' names"
    if stated := _to_blame(checkpoint, added, found):
        raise CheckpointError(f"{checkpoint.path / 'config.json'} has the {stated}, which {says}: correct it")
    if wanted == _NONE:
        raise CheckpointError(
            f"{checkpoint.path} holds {name!r}, which the model of its config.json does not have: save the model alone"
        )
    raise CheckpointError(f"{checkpoint.path}: config.json {says}; config and weights do not belong together")


def _first_wrong(
    checkpoint: Checkpoint, layout: LlavaLayout, added: Shapes, found: Shapes
) -> tuple[str, str, str] | None:
    """Return a tensor's name, the shape that config.json asks for and the stored one, where they differ.

    It is one that config.json does not ask for only where all others are right.
    """
    config = checkpoint.config | {"text_config": layout.text_config, "vision_config": _vision(checkpoint)}
    expected = {memory_name(name) or name: shape for name, shape in (llava_tensors(config) | added).items()}
    tied = {"lm_head.weight"} if is_tied(config) else set()
    for name in (*sorted(expected), *sorted(found.keys() - expected.keys() - tied)):
        wanted, stored = (str(list(s[name])) if name in s else _NONE for s in (expected, found))
        if wanted != stored:
            return name, wanted, stored
    return None


def _to_blame(checkpoint: Checkpoint, added: Shapes, found: Shapes) -> str:
    """Return the key without which config and weights agree, with its value; empty if there is none."""
    for key in keys(checkpoint.config):
        rest, value = without(checkpoint.config, key)
        trial = replace(checkpoint, config=rest)
        with suppress(CheckpointError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
            if _first_wrong(trial, LlavaLayout.of(trial), added, found) is None:
                return f"{'.'.join(key)} {value!r}"
    return ""


def _found(checkpoint: Checkpoint) -> Shapes:
    """Return the stored shapes by their names in memory."""
    found: Shapes = {}
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith(COMPUTED):
            continue
        check_float(tensor, checkpoint.path)
        name = memory_name(tensor.name) or tensor.name
        if name in found:
            raise CheckpointError(f"{checkpoint.path} holds {name!r} under two names: expected every tensor once")
        found[name] = tensor.shape
    return found


def _vision(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the vision_config with transformers' defaults filled in."""
    where, given = checkpoint.path, checkpoint.config["vision_config"]
    tower = VISION_TOWERS[given["model_type"]]
    vision = tower.completed(given)
    for key, default in tower.defaults.items():
        if type(default) is int and (type(vision[key]) is not int or vision[key] < 1):
            raise impossible(where, f"vision_config.{key}", vision[key])
    count = vision.get("num_hidden_layers")
    if count is None:  # LLaVA-HR's two towers end in one
        return vision
    if count > len(checkpoint.tensors):  # before every layer is listed
        raise CheckpointError(f"{where}: vision_config has more layers than the weights: they do not belong together")
    layers = checkpoint.config.get("vision_feature_layer", Family.of(checkpoint.config).feature_layer)
    for layer in layers if isinstance(layers, list) else [layers]:
        if type(layer) is not int or not -count <= layer + 1 <= count + 1:  # 0 is the embeddings
            raise CheckpointError(
                f"{where / 'config.json'} has the vision_feature_layer {layers!r}: a vision tower of {count} layers "
                f"has no feature layer {layer!r}"
            )
    return vision
