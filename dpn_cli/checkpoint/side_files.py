"""The small files of a model that go along with its weights: tokenizer, processor, template, licence. No torch.

They go along by name, and without what makes transformers run code. What else a folder holds stays behind.
"""

import json
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import BIN_INDEX_FILE, INDEX_FILE, read_json
from dpn_cli.checkpoint.links import WEIGHTS_SUFFIXES
from dpn_cli.checkpoint.writer import RECIPE_FILE, copy_file, write_json
from dpn_cli.errors import CheckpointError
from dpn_cli.limits import MAX_SIDE_FILE_BYTES
from dpn_cli.notation import some

_PATTERNS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tekken.json", "*.model", "*.tiktoken",
    "*processor_config.json", "generation_config.json", "chat_template.json", "*.jinja",
)  # fmt: skip
_LICENCES = ("license", "licence", "notice", "copying", "use_policy")
_TEXT_SUFFIXES = {"", ".txt", ".md", ".rst", ".html", ".pdf"}
_WRITTEN_ANEW = {"config.json", INDEX_FILE, BIN_INDEX_FILE, RECIPE_FILE, "README.md"}
_SHOWN = {".md", ".png", ".jpg", ".jpeg", ".gif", ".webp"}  # on a model's page

_CODE_KEYS = {"auto_map", "custom_pipelines", "custom_generate"}


def is_licence(name: str) -> bool:
    """Say whether a file holds a licence or a notice that must go along."""
    return name.lower().startswith(_LICENCES) and Path(name).suffix.lower() in _TEXT_SUFFIXES


def side_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a checkpoint's folder that go along.

    Raises:
        CheckpointError: if one is larger than such a file can be, or a link to nothing.
    """
    for path in sorted(folder.iterdir()):
        if _goes_along(path.name) and path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a symbolic link to nothing: remove it, or download the checkpoint again")
        if _goes_along(path.name) and path.is_file():
            if path.stat().st_size > MAX_SIDE_FILE_BYTES:
                raise CheckpointError(
                    f"{path} has {path.stat().st_size:,} bytes, expected at most {MAX_SIDE_FILE_BYTES:,}"
                )
            yield path


def copy_side_files(folder: Path, stage: Path) -> None:
    """Copy all side files of a checkpoint's folder into another one; see `copy_side_file`."""
    for file in side_files(folder):
        copy_side_file(file, stage)


def copy_side_file(source: Path, stage: Path) -> None:
    """Copy a file into a folder: byte for byte, or as JSON without what makes transformers run code.

    Raises:
        CheckpointError: if it should be JSON and is none.
    """
    if source.suffix == ".json":
        data = read_json(source)
        if (harmless := without_code(data)) != data:
            write_json(stage / source.name, harmless)
            return
    copy_file(source, stage / source.name)


def without_code(data: dict[str, Any]) -> dict[str, Any]:
    """Return what a JSON file holds without the keys, at any depth, that make transformers run or open other files."""
    return json.loads(json.dumps(data), object_hook=_without_code)  # deep data stop no recursion here


def left_behind(folder: Path, written: Collection[str] = ()) -> tuple[str, ...]:
    """Return a sentence about the files that somebody may miss in a copy, or nothing if there are none.

    Args:
        folder: the folder that was copied.
        written: names of the files that the copy has of its own.
    """
    names = [path.name for path in _files(folder) if path.name not in written and _is_unknown(path)]
    if not names:
        return ()
    return (f"Left behind, since dpn does not know them as parts of a model: {some(names)}.",)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _goes_along(name: str) -> bool:
    return name not in _WRITTEN_ANEW and (is_licence(name) or any(fnmatchcase(name, each) for each in _PATTERNS))


def _is_unknown(path: Path) -> bool:
    known = path.name.startswith(".") or path.name in _WRITTEN_ANEW or _goes_along(path.name)
    return not known and path.suffix not in WEIGHTS_SUFFIXES | _SHOWN


def _without_code(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if not _leads_to_code(key, value)}


def _leads_to_code(key: str, value: Any) -> bool:
    """Say so of an entry of a JSON object; in a vocabulary the same words have a number as their value."""
    if key in _CODE_KEYS:
        return not isinstance(value, int)
    if key.endswith("attn_implementation"):
        return "/" in str(value)  # a kernel of the hub
    return key.endswith("_file") and isinstance(value, str)  # a path on somebody's disk, which tokenizers open
