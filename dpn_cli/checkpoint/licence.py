"""The licence of a model, as its own card says. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dpn_cli.limits import MAX_CARD_BYTES

KEYS = ("license", "license_name", "license_link")  # the hub's words for it
_MAX_LENGTH = 200
_WORD = "tag:yaml.org,2002:str"


def read_licence(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return what the head of a checkpoint's README.md says of the licence, else its config.json; empty if neither."""
    for data in (_front_matter(folder / "README.md"), config):
        found = {key: value for key in KEYS if isinstance(value := data.get(key), str) and len(value) <= _MAX_LENGTH}
        if "license" in found:
            return found
    return {}


def _front_matter(readme: Path) -> dict[str, str]:
    """Return the words in the YAML at the head of a model card, by key; empty where it is missing or damaged."""
    if not readme.is_file():
        return {}
    with readme.open(encoding="utf-8", errors="replace") as file:
        text = file.read(MAX_CARD_BYTES)
    parts = text.split("\n---", maxsplit=1)
    if not text.startswith("---\n") or len(parts) < 2:
        return {}
    try:
        head = yaml.compose(parts[0].removeprefix("---"), yaml.SafeLoader)  # no value is made of what it says
    except (yaml.YAMLError, RecursionError):
        return {}
    entries = head.value if isinstance(head, yaml.MappingNode) else []
    return {key.value: value.value for key, value in entries if value.tag == _WORD and isinstance(key.value, str)}
