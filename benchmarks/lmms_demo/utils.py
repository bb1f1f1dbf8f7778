"""What the demo's task tells lmms-eval about a row."""

from typing import Any


def doc_to_visual(row: dict[str, Any]) -> list[Any]:
    """Return the picture of a row."""
    return [row["image"].convert("RGB")]
