"""What the measurements of a calibration depend on, in short: an unfinished one must not go on with other input."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import read_json
from dpn_cli.errors import UsageError
from dpn_cli.recipe import CalibrationRecipe

_EDGE_BYTES = 1 << 20  # of a shard, hashed at either end
_FITTED = {"budgets", "lambda", "calibration"}  # what calibration itself writes into the pyramid's config
_AFTER_MEASURING = {"budget", "epochs", "learning_rate"}


def fingerprint(checkpoint: Path, data_digest: str, recipe: CalibrationRecipe) -> dict[str, Any]:
    """Return plain data that changes with whatever the measurements depend on.

    Args:
        checkpoint: the converted folder; of its shards the size, the header and both ends are looked at.
        data_digest: of the samples to be measured, see `Dataset`.
        recipe: of it the settings that matter before the routers are fitted.
    """
    pyramid = read_json(checkpoint / "config.json").get("pyramid") or {}
    return {
        **recipe.model_dump(mode="json", exclude=_AFTER_MEASURING),
        "healed for": recipe.budget if recipe.heal.method != "none" else None,
        "data": data_digest,
        "weights": weights_digest(checkpoint.glob("model*.safetensors")),
        "pyramid": {key: value for key, value in pyramid.items() if key not in _FITTED},
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the keys whose values differ, for a message; empty if none does."""
    return ", ".join(sorted(key for key in {*one, *other} if one.get(key) != other.get(key)))


def validate_same(fingerprints: Sequence[Mapping[str, Any]]) -> None:
    """Check that all processes have the same input.

    Raises:
        UsageError: naming the first one that has not, and what of it differs.
    """
    for process, each in enumerate(fingerprints):
        if changed := differences(fingerprints[0], each):
            raise UsageError(
                f"process {process} has other values of {changed} than the main one: "
                "give all machines the same checkpoint, data and versions"
            )


def weights_digest(shards: Iterable[Path]) -> str:
    """Return a digest of the names, sizes and both ends of some files."""
    digest = hashlib.sha256()
    for part in (part for shard in sorted(shards) if shard.is_file() for part in _edges(shard)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _edges(shard: Path) -> Iterable[bytes]:
    size = shard.stat().st_size
    yield f"{shard.name} {size}".encode()
    with shard.open("rb") as file:
        yield file.read(_EDGE_BYTES)
        file.seek(max(0, size - _EDGE_BYTES))
        yield file.read()
