"""The vision tower of a LLaVA in the original layout: a CLIP model, in a repository of its own as a rule. No torch."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpn_cli.checkpoint.headers import read_config, read_json_if_there
from dpn_cli.checkpoint.source import resolve_source
from dpn_cli.conversion.rewriting import Planned
from dpn_cli.conversion.weights import open_weights
from dpn_cli.errors import CheckpointError
from dpn_cli.families.tensors import COMPUTED
from dpn_cli.families.vision import VISION_TOWERS

CLIP = VISION_TOWERS["clip_vision_model"]

_INSIDE = "vision_model."
_STORED = "model.vision_tower.vision_tower."


class Tower(Protocol):
    """A vision tower, as the import of an original needs it."""

    @property
    def config(self) -> dict[str, Any]:
        """Return the vision_config, complete."""

    @property
    def unused(self) -> Collection[str]:
        """Return the names of the original's tensors that nothing reads."""

    def features(self, original: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of a LLaVA's config that say which features it takes."""

    def renamed(self, name: str) -> str | None:
        """Return what a tensor of the original is called in a LLaVA, or None if it is not the tower's."""

    def planned(self) -> Iterator[tuple[str, Planned]]:
        """Yield the tensors that the original does not hold, by their names in a LLaVA."""

    def normalisation(self) -> dict[str, Any]:
        """Return `image_mean` and `image_std`, where they are not CLIP's."""


@dataclass(frozen=True)
class ClipTower:
    """A CLIP model.

    Attributes:
        folder: the model's folder.
        stored: the model's config.json.
        config: the config of its vision part, complete.
        unused: names of the original's tensors that nothing reads.
    """

    folder: Path
    stored: dict[str, Any]
    config: dict[str, Any]
    unused: Collection[str] = ()

    @classmethod
    def find(cls, name: str) -> "ClipTower":
        """Find a vision tower by folder or hub id.

        Raises:
            CheckpointError: if there is none, or it is not CLIP's.
        """
        folder = resolve_source(name).path
        config = stored = read_config(folder)
        kind = config.get("model_type")
        if kind == "clip":
            config = config.get("vision_config")  # type: ignore[assignment]
        if kind not in ("clip", CLIP.model_type) or not isinstance(config, dict):
            raise CheckpointError(f"{folder} is a {kind!r} model, expected a CLIP model as the vision tower")
        settings = {key: config.get(key, default) for key, default in CLIP.defaults.items()}
        kinds = all(type(settings[key]) is type(default) for key, default in CLIP.defaults.items())
        if not kinds or any(type(value) is not str and value <= 0 for value in settings.values()):
            raise CheckpointError(f"{folder / 'config.json'} has impossible sizes: download it again")
        return cls(folder, stored, {"model_type": CLIP.model_type, **settings})

    def features(self, original: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the original says about the layer; the class token is left out."""
        layer = original.get("mm_vision_select_layer", -2)
        return {"vision_feature_layer": layer, "vision_feature_select_strategy": CLIP.select_strategy}

    def renamed(self, name: str) -> str | None:
        """Return the name of a tensor that a fine-tune has saved along."""
        if not name.startswith(_STORED):
            return None
        return f"vision_tower.{_INSIDE}{name.removeprefix(_STORED).removeprefix(_INSIDE)}"

    def planned(self) -> Iterator[tuple[str, Planned]]:
        """Yield the tensors of the vision part, by their names in a LLaVA."""
        weights = open_weights(self.folder, self.stored)
        inside = any(name.startswith(_INSIDE) for name in weights.tensors)
        for name in weights.tensors:
            if name.startswith(_INSIDE) == inside and not name.endswith(COMPUTED):
                yield f"vision_tower.{_INSIDE}{name.removeprefix(_INSIDE)}", Planned.of(weights, name)

    def normalisation(self) -> dict[str, Any]:
        """Return `image_mean` and `image_std`, where they are noted."""
        path = self.folder / "preprocessor_config.json"
        data = read_json_if_there(path)
        found: dict[str, Any] = {key: data[key] for key in ("image_mean", "image_std") if key in data}
        for key, values in found.items():
            if not isinstance(values, list) or len(values) != 3 or not {type(v) for v in values} <= {int, float}:
                raise CheckpointError(f"{path} has an impossible {key}: {values!r}, expected three numbers")
        return found
