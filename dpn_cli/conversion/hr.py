"""The vision tower of an original LLaVA-HR: fine-tuned CLIP and ConvNeXt, both in the checkpoint itself. No torch."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from dpn_cli.conversion.rewriting import Planned
from dpn_cli.conversion.tower import CLIP, ClipTower
from dpn_cli.conversion.weights import Weights
from dpn_cli.errors import CheckpointError
from dpn_cli.families.vision import HR_TOWER, VISION_TOWERS

_FAST = "model.vision_tower.fast_vision_tower.vision_tower.vision_model."
_SLOW = "model.vision_tower.slow_vision_tower.vision_tower."
_BLOCK = re.escape(_SLOW) + r"stages\.(\d+)\.blocks\.(\d+)\."
_NEW_BLOCK = r"vision_tower.slow.\1.layers.\2."
_RENAMES = tuple(
    (re.compile(old), new)
    for old, new in (
        (re.escape(_FAST) + "(.+)", r"vision_tower.fast.\1"),
        (re.escape(_SLOW) + r"stem\.(.+)", r"vision_tower.slow.0.downsample_layers.\1"),
        (re.escape(_SLOW) + r"stages\.(\d+)\.downsample\.(.+)", r"vision_tower.slow.\1.downsample_layers.\2"),
        (_BLOCK + r"conv_dw\.(.+)", _NEW_BLOCK + r"depthwise_conv.\3"),
        (_BLOCK + r"norm\.(.+)", _NEW_BLOCK + r"layer_norm.\3"),
        (_BLOCK + r"mlp\.fc(.+)", _NEW_BLOCK + r"pointwise_conv\3"),
        (_BLOCK + "(?:weight|gamma)", _NEW_BLOCK + "gamma"),  # the layer scale: the authors' name, and timm's
        (r"model\.vision_tower\.align_stages_latent\.(.+)", r"vision_tower.adapters.\1"),
        (r"model\.vision_tower\.align_stages\.0\.(.+)", r"vision_tower.alignment.\1"),
    )
)
_STAGES = 4  # of ConvNeXt, and of CLIP between the adapters
_STRIDE = 32  # of ConvNeXt, in pixels
_HEAD = 64  # width of an attention head in all of OpenAI's CLIP models


@dataclass(frozen=True)
class HrTower:
    """The dual tower: its config and the tensors of ConvNeXt's classifier, which nothing reads."""

    config: dict[str, Any]
    unused: Collection[str]

    @classmethod
    def of(cls, weights: Weights, original: Mapping[str, Any], vision_tower: str | None) -> "HrTower":
        """Read the tower's sizes from its tensors.

        Args:
            weights: the checkpoint's tensors.
            original: the checkpoint's config.json.
            vision_tower: folder or hub id of the CLIP model that the fast tower's config comes from; OpenAI's models
                need none.

        Raises:
            CheckpointError: if the tower is not LLaVA-HR's, or takes pictures of an impossible size.
        """
        fast, slow = _fast_config(weights, original, vision_tower), _slow_config(weights, original)
        size = original.get("input_image_size")
        own = fast["image_size"] // fast["patch_size"]
        if type(size) is not int or size < _STRIDE or size % _STRIDE or not _fits(size, own):
            raise CheckpointError(
                f"{weights.folder}: config.json has {size!r} as input_image_size, expected {_STRIDE} times a number "
                f"that is at least {own} or divides it, such as 768 or 1024"
            )
        config = {
            "model_type": HR_TOWER,
            "fast_config": fast,
            "slow_config": slow,
            "has_adapters": not original.get("freeze_vision", False),
            "image_size": size,
            "patch_size": size // max(size // _STRIDE, own),
            "hidden_size": fast["hidden_size"],
        }
        return cls(config, frozenset(name for name in weights.tensors if name.startswith(f"{_SLOW}head.")))

    def features(self, original: Mapping[str, Any]) -> dict[str, Any]:
        """Return what finds the tower's one output, whatever layer the original names: it ignores that."""
        return {"vision_feature_layer": -1, "vision_feature_select_strategy": VISION_TOWERS[HR_TOWER].select_strategy}

    def renamed(self, name: str) -> str | None:
        """Return what one of the tower's tensors is called in a LLaVA."""
        for old, new in _RENAMES:
            if match := old.fullmatch(name):
                return match.expand(new)
        return None

    def planned(self) -> Iterator[tuple[str, Planned]]:
        """Yield nothing: the checkpoint holds the whole tower."""
        return iter(())

    def normalisation(self) -> dict[str, Any]:
        """Return nothing: it is CLIP's."""
        return {}


def _fits(size: int, own: int) -> bool:
    """Say whether ConvNeXt's grid of a picture can be brought to CLIP's, which is `own` wide at least."""
    side = size // _STRIDE
    return side >= own or (own % side == 0 and size % own == 0)


def _fast_config(weights: Weights, original: Mapping[str, Any], vision_tower: str | None) -> dict[str, Any]:
    """Return CLIP's config: the sizes as they are stored, the rest as in OpenAI's models."""
    folder, name = weights.folder, original.get("mm_vision_tower")
    hidden, _, patch, _ = _shape(weights, f"{_FAST}embeddings.patch_embedding.weight", 4)
    layers = _count(weights, f"{_FAST}encoder.layers.")
    if layers % _STAGES:
        raise CheckpointError(f"{folder}: CLIP has {layers} layers, expected {_STAGES} stages of equal depth")
    if vision_tower is not None:
        return ClipTower.find(vision_tower).config | {"num_hidden_layers": layers}
    if not PurePosixPath(str(name)).name.startswith("clip-vit-") or hidden % _HEAD:
        raise CheckpointError(
            f"{folder} has a CLIP of width {hidden} from {name!r}, expected one of OpenAI's: pass as --vision-tower "
            "PATH|ID the model that it was trained from"
        )
    positions, _ = _shape(weights, f"{_FAST}embeddings.position_embedding.weight", 2)
    return CLIP.completed({
        "model_type": CLIP.model_type,
        "hidden_size": hidden,
        "intermediate_size": _shape(weights, f"{_FAST}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // _HEAD,
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
    })  # fmt: skip


def _slow_config(weights: Weights, original: Mapping[str, Any]) -> dict[str, Any]:
    """Return ConvNeXt's config; the tag of the original's model says nothing but whether it is XXL."""
    blocks = [f"{_SLOW}stages.{i}.blocks." for i in range(_STAGES)]
    return {
        "model_type": "dinov3_convnext",
        "hidden_sizes": [_shape(weights, f"{block}0.norm.weight", 1)[0] for block in blocks],
        "depths": [_count(weights, block) for block in blocks],
        "layer_norm_eps": 1e-5 if "xxlarge" in str(original.get("vision_tower_slow")) else 1e-6,
    }


def _shape(weights: Weights, name: str, dims: int) -> tuple[int, ...]:
    found = weights.tensors[name].shape if name in weights.tensors else None
    if found is None or len(found) != dims:
        raise CheckpointError(
            f"{weights.folder}: config.json says is_multipath_encoder, but {name} is "
            f"{'missing' if found is None else list(found)}: expected both towers of a LLaVA-HR"
        )
    return found


def _count(weights: Weights, start: str) -> int:
    """Return how many numbered parts have names that begin so."""
    return len({name[len(start) :].split(".")[0] for name in weights.tensors if name.startswith(start)})
