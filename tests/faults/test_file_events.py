"""kill -9 at 50 file events of a command: nothing is ever mixed, and the same command line ends as if undisturbed."""

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.faults.killing import run
from tests.runs import noise_pictures

MOMENTS = 50
PYRAMID = ("sites=[{after_layer: 1, experts: [keep, 'pool:2x2']}]", "routes=[keep, 'pool:2x2']")  # no survey
QUICK = ("epochs=1", "batch_size=16", "answer_tokens=1", "holdout=0.25")
HEAL = ("method=lora", "steps=2", "batch_size=1", "gradient_accumulation=1", "save_every=1")


def calibrate(*settings: str) -> list[str]:
    words = [word for each in (*QUICK, *settings) for word in ("--set", f"calibration.{each}")]
    data = ["--data", "../pictures", "--samples", "16", "--budget", "0.8"]
    return ["calibrate", "--model", "tiny-dpn", "--force", *data, *words]


def heal(rank: int) -> list[str]:
    return calibrate(f"heal.rank={rank}", *(f"heal.{each}" for each in HEAL))


EXPORT = ["export", "--model", "tiny-dpn", "--output", "out", "--force"]
COMMANDS = {
    "calibrate": calibrate("seed=1"),
    "heal": heal(rank=2),
    "export": [*EXPORT, "--budget", "0.9"],
    "eval": ["eval", "--model", "tiny-dpn", "--data", "../pictures", "--max-new-tokens", "1", "--json"],
    "convert": ["convert", "../source", "--output", "tiny-dpn", "--force"],
}


@pytest.fixture(scope="module")
def calibrated(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint that has been healed, `tiny-dpn`, and its export, `out`."""
    root = tmp_path_factory.mktemp("killed")
    folder, pictures = root / "start", root / "pictures"
    folder.mkdir()
    pictures.mkdir()
    noise_pictures(pictures, 16)
    shutil.copytree(tiny_llava, root / "source")
    words = [word for each in PYRAMID for word in ("--set", f"pyramid.{each}")]
    for line in (["convert", "../source", "--output", "tiny-dpn", *words], heal(rank=1), EXPORT):
        assert run(line, folder).code == 0
    return folder


def files(folder: Path) -> dict[str, str]:
    """Return digests of all files, hidden ones and empty folders too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes().replace(str(folder).encode(), b"")).hexdigest()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


def copy(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(name)))


def exported(folder: Path) -> dict[str, str] | str:
    """Return what a folder's checkpoint is exported as, or why it is not."""
    other = copy(folder, f"{folder.name}-exported")
    try:
        done = run(EXPORT, other)
        return files(other / "out") if done.code == 0 else done.errors
    finally:
        shutil.rmtree(other)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_at_a_file_event_mixes_nothing_and_costs_nothing(calibrated: Path, command: str) -> None:
    line = COMMANDS[command]
    undisturbed = run(line, where := copy(calibrated, f"{command}-undisturbed"))
    assert undisturbed.code == 0
    wanted, outputs = files(where), [files(each / "out") for each in (calibrated, where)]
    exports = [exported(calibrated), exported(where)]
    last, moments = undisturbed.events - 1, range(MOMENTS)
    for event in sorted({round(moment * last / (MOMENTS - 1)) for moment in moments}):  # all, where there are fewer
        folder = copy(calibrated, f"{command}-{event}")
        assert run(line, folder, event).was_killed
        assert not (folder / "out").exists() or files(folder / "out") in outputs
        assert not (folder / "tiny-dpn").exists() or exported(folder) in exports
        again = run(line, folder)
        assert (again.code, again.output) == (0, undisturbed.output)
        assert files(folder) == wanted, f"event {event} of {undisturbed.events}"
        shutil.rmtree(folder)
