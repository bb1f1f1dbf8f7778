"""What measurements depend on, in short: an unfinished calibration or evaluation must not go on with other input."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import WEIGHTS_KEY, Checkpoint
from dpn_cli.checkpoint.links import TEMPLATES_FOLDER
from dpn_cli.checkpoint.lora import Lora
from dpn_cli.checkpoint.side_files import side_files
from dpn_cli.checkpoint.streams import read_pieces
from dpn_cli.errors import UsageError
from dpn_cli.inference.loading import default_device
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.pyramid.config import FITTED_PARTS, PyramidConfig

PACKAGES = ("dpn-cli", "torch", "transformers", "tokenizers", "pillow", "torchvision")

_WHOLE_BYTES = 1 << 26  # of a file that is hashed whole
_HEADER_BYTES = 1 << 20
_PARTS, _PART_BYTES = 2048, 1 << 12  # of a larger one, at equal distances: training and merging change whole matrices
_FITTED = {"budgets", "lambda", "calibration", "mean_distortions"}  # what calibration itself writes
_OF_THE_FIT = {"epochs", "learning_rate"}
_CALIBRATED = tuple(f".{part}." for part in FITTED_PARTS)  # in the names of tensors


def fingerprint(
    checkpoint: Checkpoint, data_digest: str, recipe: CalibrationRecipe, pyramid: PyramidConfig, surveys: bool
) -> dict[str, Any]:
    """Return plain data that changes with whatever the measurements of a calibration depend on.

    Args:
        checkpoint: the converted checkpoint; of its shards, `weights_digest` looks at a part.
        data_digest: digest of the samples to measure, see `Dataset`.
        recipe: the recipe; only settings that matter before the routers are fitted count.
        pyramid: the pyramid to calibrate, or the candidates of a survey.
        surveys: whether it is the latter; a survey chooses routes for a budget.
    """
    fitted = {tensor.file for tensor in checkpoint.tensors.values() if _is_calibrated(tensor.name)}
    beside = [t for t in checkpoint.tensors.values() if t.file in fitted and not _is_calibrated(t.name)]
    settings = {key: value for key, value in pyramid.to_dict().items() if key not in _FITTED}
    heals = recipe.heal.method != "none"
    after = set() if heals else _OF_THE_FIT if surveys else {*_OF_THE_FIT, "budget"}  # healing measures once more
    packages = [*PACKAGES, *["bitsandbytes"] * (recipe.load_in is not None), *["peft"] * (recipe.training is not None)]
    return {
        **_surroundings(checkpoint.path, packages),
        **recipe.model_dump(mode="json", exclude=after),
        "data": data_digest,
        "weights": weights_digest(checkpoint.path / file for file in checkpoint.files if file not in fitted),
        "pooling weights": _digest(piece for tensor in beside for piece in read_pieces(checkpoint.path, tensor)),
        "config.json": {k: v for k, v in checkpoint.config.items() if k != WEIGHTS_KEY} | {"pyramid": settings},
    }


def _is_calibrated(name: str) -> bool:
    return any(part in name for part in _CALIBRATED)


def evaluation_fingerprint(checkpoint: Checkpoint, adapter: Lora | None, data_digest: str) -> dict[str, Any]:
    """Return plain data that changes with whatever the results of an evaluation depend on, its settings apart.

    Args:
        checkpoint: a converted or exported checkpoint.
        adapter: the adapter of a healed checkpoint, or None.
        data_digest: digest of the samples, see `Dataset`.
    """
    return {
        **_surroundings(checkpoint.path, [*PACKAGES, *["peft"] * (adapter is not None)]),
        "data": data_digest,
        **model_fingerprint(checkpoint, adapter),
    }


def model_fingerprint(checkpoint: Checkpoint, adapter: Lora | None = None) -> dict[str, Any]:
    """Return plain data that changes with what a model answers: its weights and whatever belongs to them."""
    return {
        **_side_digests(checkpoint.path),
        "weights": served_digest(checkpoint, adapter),
        "config.json": checkpoint.config,
    }


def served_digest(checkpoint: Checkpoint, adapter: Lora | None) -> str:
    """Return a digest of all weights that a model answers with, those of its adapter included; see `weights_digest`."""
    files = [checkpoint.path / file for file in checkpoint.files]
    return weights_digest([*files, *(adapter.folder.iterdir() if adapter else ())])


def _surroundings(folder: Path, packages: Iterable[str]) -> dict[str, Any]:
    """Return what matters beside weights, config and data: tokenizer, processor, chat template, versions, device."""
    return {
        **_side_digests(folder),
        "versions": {package: _version(package) for package in packages},
        "device": default_device(),
    }


def _side_digests(folder: Path) -> dict[str, str]:
    files = (*side_files(folder), *(folder / TEMPLATES_FOLDER).glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): _digest([path.read_bytes()]) for path in files}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the keys whose values differ, for a message; empty if none does."""
    return ", ".join(sorted(_different(one, other)))


def _different(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for key in {*one, *other}:
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from (f"{key}.{inner}" for inner in _different(mine, theirs))
        elif repr(mine) != repr(theirs):  # as text, for which NaN is NaN
            yield key


def validate_same(fingerprints: Sequence[Mapping[str, Any]]) -> None:
    """Check that all processes have the same input.

    Raises:
        UsageError: if one has another; names it, and what differs.
    """
    for process, each in enumerate(fingerprints):
        if changed := differences(fingerprints[0], each):
            raise UsageError(
                f"process {process} has other values of {changed} than the main one: "
                "give all machines the same checkpoint, data and versions"
            )


def weights_digest(shards: Iterable[Path]) -> str:
    """Return a digest of the names and sizes of some files, and of their bytes; of large ones, of many small parts."""
    return _digest(part for shard in sorted(shards) for part in _parts(shard))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _parts(shard: Path) -> Iterator[bytes]:
    size = shard.stat().st_size
    yield f"{shard.name} {size}".encode()
    with shard.open("rb") as file:
        if size <= _WHOLE_BYTES:
            yield file.read()
            return
        yield file.read(_HEADER_BYTES)
        for part in range(_PARTS + 1):
            file.seek(part * (size - _PART_BYTES) // _PARTS)
            yield file.read(_PART_BYTES)
