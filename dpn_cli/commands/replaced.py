"""What a message says of that which `--force` has replaced."""

from pathlib import Path

from dpn_cli.errors import CheckpointError


def in_place_of(folder: Path) -> str:
    """Return the end of "Wrote FOLDER", as long as the earlier one is there; empty where there is none."""
    from dpn_cli.checkpoint.layout import open_converted

    if not folder.is_dir() or not any(folder.iterdir()):
        return ""
    try:
        calibrated = open_converted(folder)[2].calibrated_on
    except CheckpointError:  # a damaged one is replaced too
        return " in place of an earlier one"
    return " in place of an earlier one" + (f", which was calibrated {calibrated}" if calibrated else "")
