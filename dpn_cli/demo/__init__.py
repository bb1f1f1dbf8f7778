"""The embedded teacher: a small LLaVA, its pictures, and how it was trained."""

from pathlib import Path


def teacher_path() -> Path:
    """Return the folder of the embedded teacher checkpoint."""
    return Path(__file__).with_name("teacher")
