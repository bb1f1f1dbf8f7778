"""The licence of a model, as its own card says. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

KEYS = ("license", "license_name", "license_link")  # the hub's words for it
_MAX_LENGTH = 200


def read_licence(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return what the head of a checkpoint's README.md says of the licence, else its config.json; empty if neither."""
    for data in (_front_matter(folder / "README.md"), config):
        found = {key: value for key in KEYS if isinstance(value := data.get(key), str) and len(value) <= _MAX_LENGTH}
        if "license" in found:
            return found
    return {}


def _front_matter(readme: Path) -> dict[str, object]:
    """Return the YAML at the head of a model card; empty where it is missing or damaged."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    parts = text.split("\n---", maxsplit=1)
    if not text.startswith("---\n") or len(parts) < 2:
        return {}
    try:
        data = yaml.safe_load(parts[0].removeprefix("---"))
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}
