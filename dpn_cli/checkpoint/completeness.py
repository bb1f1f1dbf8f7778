"""Is every tensor of a LLaVA there, once, in its shape? transformers draws a missing one at random. No torch."""

from typing import Any

from dpn_cli.checkpoint.headers import Checkpoint, check_float
from dpn_cli.checkpoint.layout import LlavaLayout
from dpn_cli.errors import CheckpointError
from dpn_cli.families.family import Family
from dpn_cli.families.tensors import COMPUTED, is_tied, llava_tensors, memory_name
from dpn_cli.families.vision import VISION_TOWERS
from dpn_cli.pyramid.config import Shapes


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
    config = checkpoint.config | {"text_config": layout.text_config, "vision_config": _vision(checkpoint)}
    expected = {memory_name(name) or name: shape for name, shape in (llava_tensors(config) | added).items()}
    found = _found(checkpoint)
    if is_tied(config):
        found.pop("lm_head.weight", None)
    for name in sorted(found.keys() | expected.keys()):
        wanted, stored = (str(list(s[name])) if name in s else "no such tensor" for s in (expected, found))
        if wanted != stored:
            raise CheckpointError(
                f"{checkpoint.path}: config.json asks for {wanted}, the weights have {stored}: {name!r}, in "
                "transformers' names; config and weights do not belong together"
            )


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
            raise CheckpointError(f"{where}: vision_config has an impossible {key}: {vision[key]!r}")
    count = vision.get("num_hidden_layers")
    if count is None:  # LLaVA-HR's two towers end in one
        return vision
    if count > len(checkpoint.tensors):  # before every layer is listed
        raise CheckpointError(f"{where}: vision_config has more layers than the weights: they do not belong together")
    layers = checkpoint.config.get("vision_feature_layer", Family.of(checkpoint.config).feature_layer)
    for layer in layers if isinstance(layers, list) else [layers]:
        if type(layer) is not int or not -count <= layer + 1 <= count + 1:  # 0 is the embeddings
            raise CheckpointError(f"{where}: a vision tower of {count} layers has no feature layer {layer!r}")
    return vision
