"""From what the user typed (a folder, an alias, a hub id) to a folder on disk. No torch."""

import errno
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import (
    BIN_FILE,
    BIN_INDEX_FILE,
    IMAGES_FILE,
    INDEX_FILE,
    PROCESSOR_FILE,
    SINGLE_FILE,
    TOKENIZER_CONFIG_FILE,
    read_json,
)
from dpn_cli.errors import CheckpointError, did_you_mean
from dpn_cli.families.family import ALIASES

DEMO = "demo"

_REPO_PREFIX = "models--"  # of a model's folder in the hub's cache
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[\w./-]+)?")
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}
_NEEDED = ["*.safetensors", INDEX_FILE, "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "README.md"]
_PICKLED = [*_NEEDED, "pytorch_model*.bin"]  # only where there are no safetensors


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        path: the model's folder.
        name: a short name, from which the output's name is made.
        origin: Base model to record: the hub id, `demo`, or the folder's name.
        revision: the commit, if the model is from the hub.
    """

    path: Path
    name: str
    origin: str
    revision: str | None = None

    @property
    def label(self) -> str:
        """What messages call it: as the hub does, or by its path."""
        return str(self.path) if self.revision is None else self.reference

    @property
    def reference(self) -> str:
        """What names it for good: OWNER/NAME@COMMIT for a model of the hub, else its origin."""
        return self.origin if self.revision is None else f"{self.origin}@{self.revision}"


def resolve_source(model: str, **hub: Any) -> Source:
    """Find a model: a local folder first, then an alias, then a hub id (its cache before the network).

    Args:
        model: a folder, an alias, `OWNER/NAME` or `OWNER/NAME@REVISION` (a branch, a tag or a commit).
        **hub: options of `huggingface_hub.snapshot_download` for models of the hub, such as `cache_dir`.

    Raises:
        CheckpointError: if there is none, or the hub cannot be reached; says what to do.
    """
    path = Path(model).expanduser()
    if path.exists():
        return _from_folder(path)
    if model == DEMO:
        from dpn_cli.demo import teacher_path

        return Source(teacher_path(), DEMO, origin=DEMO)
    if model in ALIASES:
        return _from_hub(ALIASES[model], name=model, **hub)
    repo_id, _, revision = model.partition("@")
    if not _HUB_ID.fullmatch(model) or not _is_hub_id(repo_id):
        hint = did_you_mean(model, [*ALIASES, DEMO])
        raise CheckpointError(
            f"{model} does not exist: expected a checkpoint folder, a hub id (owner/name or owner/name@revision), or "
            f"one of {', '.join([*ALIASES, DEMO])}.{hint}"
        )
    return _from_hub(repo_id, name=repo_id.split("/")[1], **({"revision": revision} if revision else {}) | hub)


def _is_hub_id(repo_id: str) -> bool:
    """Say whether the hub's client takes a name for one of the hub's."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, yet not listed

    with suppress(HFValidationError):
        validate_repo_id(repo_id)
        return True
    return False


def _from_folder(path: Path) -> Source:
    """Return what a path leads to; a snapshot in a cache of the hub's client is a model of the hub.

    A model's folder in that cache leads to the snapshot of its main branch.
    """
    resolved = path.resolve()
    if resolved.name.startswith(_REPO_PREFIX) and (main := resolved / "refs" / "main").is_file():
        return _from_folder(resolved / "snapshots" / main.read_text().strip())
    name = resolved.name if path.name in {"", ".."} else path.name
    repo_folder = resolved.parent.parent.name
    if resolved.parent.name != "snapshots" or not repo_folder.startswith(_REPO_PREFIX):
        return Source(path, name, origin=name)
    repo_id = repo_folder.removeprefix(_REPO_PREFIX).replace("--", "/")  # ids of the hub have no -- of their own
    commit = resolved.name
    return Source(path, repo_id.split("/")[-1] if name == commit else name, repo_id, revision=commit)


def _from_hub(repo_id: str, name: str, **hub: Any) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo_id, **hub | {"local_files_only": True}, allow_patterns=_NEEDED))
        if not _has_weights(folder):
            raise LocalEntryNotFoundError(f"the copy of {repo_id} in the cache is incomplete")
        if not _has_processor(folder):
            with suppress(CheckpointError):  # offline; some models have none
                folder = _download(repo_id, _NEEDED, hub)
    except LocalEntryNotFoundError:
        folder = _download(repo_id, _NEEDED, hub)
        if not list(folder.glob("*.safetensors")):
            folder = _download(repo_id, _PICKLED, hub)
    return Source(folder, name, origin=repo_id, revision=folder.name)


def _download(repo_id: str, patterns: list[str], hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repo_id, **hub, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(f"{repo_id} is gated: accept its terms on the hub and run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} has no revision {hub.get('revision', 'main')!r} on the hub: name a branch, a tag or a commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is neither a local folder nor a public model on the hub (a private one needs `hf auth login`)"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
            raise
        reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        at = f" --revision {hub['revision']}" if "revision" in hub else ""
        raise CheckpointError(
            f"{repo_id} is not a local folder, is not in the hub's local cache{at and ' at that revision'}, and "
            f"{reason}: download it where you are online (`hf download {repo_id}{at} --local-dir DIR`) and pass that "
            "folder"
        ) from error


def _has_processor(snapshot: Path) -> bool:
    """Say whether a cached snapshot has a processor, or the part that its layout has; loading a model fetches none."""
    return any((snapshot / file).exists() for file in (PROCESSOR_FILE, IMAGES_FILE, TOKENIZER_CONFIG_FILE))


def _has_weights(snapshot: Path) -> bool:
    """Say whether a cached snapshot has its weights: other uses and interrupted downloads leave a part."""
    for file, index in ((SINGLE_FILE, INDEX_FILE), (BIN_FILE, BIN_INDEX_FILE)):
        if (snapshot / file).exists():
            return True
        if (snapshot / index).exists():
            shards = read_json(snapshot / index).get("weight_map", {}).values()
            return all((snapshot / str(shard)).exists() for shard in set(shards))
    return False
