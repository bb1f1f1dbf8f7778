"""What a calibration has measured so far, on disk: a killed run goes on where it stopped.

Every batch has files of its own, each whole or not at all; a fingerprint tells what the measurements depend on.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.writer import replace_file, write_json
from dpn_cli.errors import UsageError

STATE_FOLDER = Path("calibration", "state")
FINGERPRINT_FILE = "fingerprint.json"


class MeasurementState:
    """The answered and the measured batches of one calibration, under `calibration/state/` of its checkpoint."""

    def __init__(self, checkpoint: Path, fingerprint: dict[str, Any]) -> None:
        """Open the state, or start it.

        Args:
            checkpoint: the converted folder.
            fingerprint: plain data: settings, data, weights and versions.

        Raises:
            UsageError: if there is a state of another calibration; names what changed.
        """
        self.folder = checkpoint / STATE_FOLDER
        stored = self._stored_fingerprint()
        wanted = json.loads(json.dumps(fingerprint))
        if stored is not None and stored != wanted:
            changed = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
            raise UsageError(
                f"{self.folder} holds an unfinished calibration with other values of {', '.join(changed)}: "
                "run its command line again to finish it, or pass --restart to drop it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / FINGERPRINT_FILE, lambda path: write_json(path, wanted))

    def _stored_fingerprint(self) -> dict[str, Any] | None:
        try:
            data = json.loads((self.folder / FINGERPRINT_FILE).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return data if isinstance(data, dict) else None

    def answers(self, batch: int) -> list[str] | None:
        """Return the teacher's answers to a batch of samples, or None if it was not asked yet."""
        path = self._answers_path(batch)
        return list(read_json(path)["answers"]) if path.is_file() else None

    def keep_answers(self, batch: int, answers: list[str]) -> None:
        """Keep the teacher's answers to a batch of samples."""
        replace_file(self._answers_path(batch), lambda path: write_json(path, {"answers": answers}))

    def load(self, batch: int) -> dict[str, torch.Tensor] | None:
        """Return a batch's measurements, or None if they were not made or cannot be read."""
        path = self._path(batch)
        try:
            return load_file(path) if path.is_file() else None
        except Exception:  # noqa: BLE001 - a damaged file of a lost disk is measured again
            return None

    def save(self, batch: int, tensors: dict[str, torch.Tensor]) -> None:
        """Keep a batch's measurements."""
        replace_file(self._path(batch), lambda path: path.write_bytes(save(tensors)))

    def _answers_path(self, batch: int) -> Path:
        return self.folder / f"answers-{batch:06d}.json"

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:06d}.safetensors"


def drop_state(checkpoint: Path) -> None:
    """Forget the measurements of a checkpoint's calibration, finished or not."""
    shutil.rmtree(checkpoint / STATE_FOLDER, ignore_errors=True)
