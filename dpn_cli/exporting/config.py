"""The config.json of an export."""

from typing import Any

from dpn_cli.checkpoint.headers import DTYPES, TORCH_DTYPES, WEIGHTS_KEY, Checkpoint
from dpn_cli.checkpoint.layout import LlavaLayout, stored_dtype
from dpn_cli.checkpoint.side_files import without_code
from dpn_cli.errors import CheckpointError
from dpn_cli.families.family import Family
from dpn_cli.families.vision import VISION_TOWERS
from dpn_cli.modeling.code import auto_map
from dpn_cli.pyramid.config import PyramidConfig


def export_config(source: Checkpoint, layout: LlavaLayout, pyramid: PyramidConfig, dtype: str | None) -> dict[str, Any]:
    """Return config.json with the export's code, pyramid and dtype.

    Args:
        source: the converted checkpoint.
        layout: the decoder's layout.
        pyramid: the exported pyramid.
        dtype: the dtype that tensors are converted to; None if they stay as they are.
    """
    family = Family.of(source.config)
    config = {key: value for key, value in without_code(source.config).items() if key != WEIGHTS_KEY} | {
        "architectures": [family.architecture],
        "auto_map": auto_map(family.stem),
        "pyramid": pyramid.to_dict(),
    }
    if dtype is None:
        return {"dtype": stored_dtype(source, layout)} | config
    for part in ("text_config", "vision_config"):
        config[part] = {key: value for key, value in config[part].items() if key not in {"dtype", "torch_dtype"}}
    config.pop("torch_dtype", None)
    return config | {"dtype": TORCH_DTYPES[DTYPES[dtype]]}


def without_unused_layers(config: dict[str, Any], source: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Leave out the vision tower's layers after the last one whose features are used.

    CLIP's `post_layernorm` stays: no feature passes it, but transformers builds it and would draw it at random.

    Returns:
        The config, and the prefixes of the names of the tensors to leave out.

    Raises:
        CheckpointError: if config.json does not say which layers are used.
    """
    vision, chosen = config["vision_config"], config.get("vision_feature_layer", Family.of(config).feature_layer)
    layers = VISION_TOWERS[vision["model_type"]].completed(vision).get("num_hidden_layers")
    if layers is None:  # LLaVA-HR's two towers end in one
        return config, ()
    indices = chosen if isinstance(chosen, list) else [chosen]
    if type(layers) is not int or not all(type(i) is int and -layers - 1 <= i <= layers for i in indices):
        raise CheckpointError(f"{source.path}: vision_feature_layer {chosen} does not fit {layers} vision layers")
    used = [i if i >= 0 else layers + 1 + i for i in indices]  # features 0 are the embeddings, i the i-th layer's
    count = max(1, *used)
    renumbered = [i - count - 1 for i in used]
    config = config | {
        "vision_config": vision | {"num_hidden_layers": count},
        "vision_feature_layer": renumbered if isinstance(chosen, list) else renumbered[0],
    }

    return config, tuple(f"model.vision_tower.encoder.layers.{i}." for i in range(count, layers))
