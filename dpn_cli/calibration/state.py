"""What a calibration has measured so far, on disk: a killed run goes on where it stopped.

Every batch has files of its own, each whole or not at all; a fingerprint tells what the measurements depend on.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from dpn_cli.calibration.settings import STATE_FOLDER
from dpn_cli.calibration.training.loop import STATE_FILE as TRAINING_FILE
from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.writer import replace_file, write_json
from dpn_cli.errors import UsageError
from dpn_cli.parallel.fingerprint import differences
from dpn_cli.parallel.kept import KeptFiles

FINGERPRINT_FILE = "fingerprint.json"
FEATURES_FILE = "features.bin"

ATTENTION = "attention-{:06d}.safetensors"
ANSWERS, SURVEYS, BATCHES = "answers-{:06d}.json", "survey-{:06d}.safetensors", "batch-{:06d}.safetensors"

_NAMES = (ANSWERS, ATTENTION, SURVEYS, BATCHES, FINGERPRINT_FILE, FEATURES_FILE, TRAINING_FILE)
_FILES = "(" + "|".join(r"\d{6}".join(map(re.escape, name.split("{:06d}"))) for name in _NAMES) + ")"
_OURS = re.compile(rf"{_FILES}|\.{_FILES}\.\d+\.tmp")  # all that is written there, and what a kill leaves of it


class MeasurementState:
    """The answered and the measured batches of one calibration, under `calibration/state/` of its checkpoint.

    Attributes:
        folder: Folder that holds everything that is kept.
        answers: the teacher's, by batch.
        attention: what predictors are fitted to, by batch.
        surveys: the columns of a batch's candidates, by round and batch.
        measurements: the columns of a batch's rows in the route table, by batch.
        features: the file for what routers read, of all batches.
    """

    def __init__(self, checkpoint: Path, fingerprint: dict[str, Any]) -> None:
        """Open the state, or start it.

        Args:
            checkpoint: the converted folder.
            fingerprint: plain data: settings, data, weights and versions.

        Raises:
            UsageError: if there is a state of another calibration; names what changed.
        """
        self.folder = checkpoint / STATE_FOLDER
        self.answers = KeptFiles[list[str]](
            self.folder,
            ANSWERS,
            read=lambda path: list(read_json(path)["answers"]),
            write=lambda path, answers: write_json(path, {"answers": answers}),
        )
        self.attention, self.surveys, self.measurements = (
            KeptFiles[dict[str, torch.Tensor]](
                self.folder,
                name,
                read=load_file,
                write=lambda path, tensors: path.write_bytes(save(tensors)),
            )
            for name in (ATTENTION, SURVEYS, BATCHES)
        )
        self.features = self.folder / FEATURES_FILE
        stored = self._stored_fingerprint()
        if stored is None:  # a kill may have left batches of nobody knows what
            drop_state(checkpoint)
        wanted = json.loads(json.dumps(fingerprint))
        if stored is not None and (changed := differences(stored, wanted)):
            unlike = _unlike(stored, wanted) or f"with other values of {changed}"
            raise UsageError(
                f"{self.folder} holds an unfinished calibration {unlike}: "
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


def _unlike(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say in which stage an unfinished calibration is another one; empty where it is not."""
    theirs, own = (each.get("only") for each in (stored, wanted))
    return "" if theirs == own else f"with --{theirs}-only" if theirs else f"without --{own}-only"


def drop_state(checkpoint: Path) -> None:
    """Forget the measurements of a checkpoint's calibration, finished or not; a file of another name is not dpn's."""
    folder = checkpoint / STATE_FOLDER
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if _OURS.fullmatch(path.name):
                path.unlink()
        folder.rmdir()
