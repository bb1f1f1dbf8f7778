"""A calibration that is killed, interrupted or out of room goes on where it stopped."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_cli import cli
from dpn_cli.calibration import calibrate as calibration
from dpn_cli.calibration.state import FEATURES_FILE
from dpn_cli.checkpoint.headers import read_json
from dpn_cli.conversion.convert import convert
from dpn_cli.parallel import fingerprint
from tests.faults.limited import largest_file
from tests.runs import DEADLOCK_S, FEW, digests, measured, noise_pictures, options, start, wait_for

KILLS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures without answers, so that the teacher is asked too."""
    return noise_pictures(tmp_path_factory.mktemp("pictures"), FEW["samples"])


@pytest.fixture(scope="module")
def converted(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(str(tiny_llava), output=tmp_path_factory.mktemp("converted") / "tiny-dpn").output


@pytest.fixture(scope="module")
def undisturbed(converted: Path, data: Path) -> dict[str, str]:
    """What a calibration that nothing disturbs leaves."""
    folder = Path(shutil.copytree(converted, converted.with_name("undisturbed")))
    assert cli.main(arguments(folder, data)) == 0
    return digests(folder)


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A checkpoint that was just converted."""
    return Path(shutil.copytree(converted, tmp_path / "tiny-dpn"))


def arguments(folder: Path, data: Path, **changes: Any) -> list[str]:
    line = ["calibrate", "--model", str(folder), "--data", str(data), "--budget", "0.6"]
    return [*line, *options({**FEW, "batch_size": 4, "holdout": 0.4, **changes})]


def batches(folder: Path) -> dict[str, bytes]:
    files = (folder / "calibration" / "state").glob("*-[0-9]*")
    return {path.name: path.read_bytes() for path in files}


def unfinished(folder: Path, data: Path) -> None:
    """Measure everything, and be interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "budget_table", raise_interrupt)
        assert cli.main(arguments(folder, data)) == 130


def raise_interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_run_ends_as_if_nothing_had_happened(folder: Path, data: Path, undisturbed: dict[str, str]) -> None:
    process = start(arguments(folder, data))
    wait_for(process, lambda: measured(folder, 3))
    process.kill()
    process.communicate()
    assert measured(folder, 3)
    assert cli.main(arguments(folder, data)) == 0
    assert digests(folder) == undisturbed


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(
    converted: Path, data: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    moments, duration = random.Random(0), 0.0
    for i in range(KILLS + 1):
        folder = Path(shutil.copytree(converted, tmp_path / f"killed-{i}"))
        process = start(arguments(folder, data))
        wait_for(process, (folder / "calibration" / "state").exists)
        begun = time.monotonic()
        if i:
            time.sleep(moments.uniform(0, duration))
            process.kill()
        process.communicate()
        duration = duration or time.monotonic() - begun  # of the first run, which ends by itself
        assert cli.main([*arguments(folder, data), "--force"]) == 0  # it may have ended
        assert digests(folder) == undisturbed


@pytest.mark.parametrize("written", ["config.json", pytest.param("calibration/report.json", marks=pytest.mark.slow)])
def test_a_kill_after_one_of_the_results_is_mended(
    folder: Path, data: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    from dpn_cli.calibration import store

    class Killed(BaseException):
        pass

    def replace_file(path: Path, *arguments: Any) -> None:
        original(path, *arguments)
        if path == folder / written:
            raise Killed

    original = store.replace_file
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store, "replace_file", replace_file)
        cli.main(arguments(folder, data))
    assert digests(folder) != undisturbed
    assert cli.main(arguments(folder, data)) == 0
    assert digests(folder) == undisturbed


def test_an_interrupt_keeps_what_was_measured(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, handler = digests(folder), signal.getsignal(signal.SIGHUP)

    def interrupt(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(calibration, "budget_table", interrupt)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what `nohup` leaves ignored stays so
    assert cli.main(arguments(folder, data)) == 130
    signal.signal(signal.SIGHUP, handler)
    was_interrupted(folder, before, *capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_keeps_what_was_measured(folder: Path, data: Path, number: int) -> None:
    before = digests(folder)
    process = start(arguments(folder, data, epochs=100_000))  # it cannot end before the signal
    wait_for(process, lambda: measured(folder, 2))
    process.send_signal(number)
    output, errors = process.communicate(timeout=DEADLOCK_S)
    assert process.returncode == 130
    was_interrupted(folder, before, output, errors)


def was_interrupted(folder: Path, before: dict[str, str], output: str, errors: str) -> None:
    """Check what an interrupted calibration says and leaves."""
    assert output == ""
    assert [line for line in errors.splitlines() if line][-2:] == [
        "Nothing that was measured is lost: run the same command line again to go on.",
        "Interrupted.",
    ]
    assert "Traceback" not in errors
    assert measured(folder, 2)
    assert not list(folder.rglob("*.tmp"))
    assert before.items() <= digests(folder).items()


@pytest.mark.parametrize("full", ["while measuring", pytest.param("while writing routers", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_sentence_and_costs_nothing(
    begun: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], full: str
) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "tiny-dpn"))
    state = folder / "calibration" / "state"
    limit = (state / FEATURES_FILE).stat().st_size  # room for all that is measured, and less than routers need
    if full == "while measuring":
        for path in sorted(state.glob("batch-*"))[2:]:
            path.unlink()
        limit -= 1
    (state / FEATURES_FILE).unlink()  # made from the batches by every run
    before = digests(folder)
    capsys.readouterr()
    with largest_file(limit):
        assert cli.main(arguments(folder, data)) == 1
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert error.endswith("(ulimit -f): make room and run the same command line again")
    (state / FEATURES_FILE).unlink()
    assert digests(folder) == before
    assert not list(folder.rglob("*.tmp"))
    assert cli.main(arguments(folder, data)) == 0


@pytest.fixture(scope="module")
def begun(converted: Path, data: Path) -> Path:
    """A checkpoint with a calibration that everything is measured of."""
    folder = Path(shutil.copytree(converted, converted.with_name("begun")))
    unfinished(folder, data)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


CHANGES: dict[str, Callable[[Path], object]] = {
    "chat_template.jinja": lambda f: (f / "chat_template.jinja").open("a").write("now"),
    "tokenizer.json": lambda f: edit(
        f / "tokenizer.json", added_tokens=read_json(f / "tokenizer.json")["added_tokens"][::-1]
    ),
    "tokenizer_config.json": lambda f: edit(f / "tokenizer_config.json", padding_side="right"),
    "processor_config.json": lambda f: edit(
        f / "processor_config.json",
        image_processor=read_json(f / "processor_config.json")["image_processor"] | {"image_mean": [0.1, 0.2, 0.3]},
    ),
    "generation_config.json": lambda f: edit(f / "generation_config.json", repetition_penalty=1.2),
    "config.json.text_config.rope_parameters.rope_theta": lambda f: edit(
        f / "config.json",
        text_config=read_json(f / "config.json")["text_config"] | {"rope_parameters": {"rope_theta": 5e5}},
    ),
    "config.json.vision_feature_layer": lambda f: edit(f / "config.json", vision_feature_layer=-1),
    "additional_chat_templates/default.jinja": lambda f: (
        (f / "additional_chat_templates").mkdir(),
        (f / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}"),
    ),
    "weights": lambda f: flip_middle_byte(next(f.glob("model*.safetensors"))),
}


def flip_middle_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("changed", CHANGES)
def test_a_checkpoint_that_changed_does_not_go_on(
    begun: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str
) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "tiny-dpn"))
    CHANGES[changed](folder)
    kept = batches(folder)
    assert cli.main(arguments(folder, data)) == 2
    error = capsys.readouterr().err
    assert "holds an unfinished calibration with other values of " in error and changed in error
    assert batches(folder) == kept != {}


def test_measurements_without_a_word_of_what_they_depend_on_are_dropped(
    begun: Path, data: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """As a kill leaves them that comes while they are being removed."""
    folder = Path(shutil.copytree(begun, tmp_path / "tiny-dpn"))
    state = folder / "calibration" / "state"
    (state / "fingerprint.json").unlink()
    batches = sorted(state.glob("batch-*"))
    shutil.copy(batches[0], batches[1])
    assert cli.main(arguments(folder, data)) == 0
    assert digests(folder) == undisturbed


def test_other_settings_or_data_do_not_go_on(
    begun: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "tiny-dpn"))
    data = Path(shutil.copytree(data, tmp_path / "pictures"))
    kept = batches(folder)

    def refused(line: list[str]) -> str:
        capsys.readouterr()
        assert cli.main(line) == 2
        return capsys.readouterr().err

    assert "other values of answer_tokens:" in refused(arguments(folder, data, answer_tokens=3))
    assert "other values of batch_size, seed:" in refused([*arguments(folder, data, batch_size=2), "--seed", "1"])
    another = [*arguments(folder, data), "--budget", "0.7"]  # a survey chooses routes for a budget
    assert "other values of budget:" in refused(another)
    Image.new("RGB", (48, 48)).save(data / "07.png")
    assert "other values of data:" in refused(arguments(folder, data))
    assert batches(folder) == kept
    assert cli.main([*arguments(folder, data), "--restart"]) == 0


def test_a_changed_matrix_of_a_large_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "_HEADER_BYTES", 100)
    monkeypatch.setattr(fingerprint, "_PARTS", 64)
    monkeypatch.setattr(fingerprint, "_PART_BYTES", 8)
    path, content = tmp_path / "a.safetensors", random.Random(0).randbytes(100_001)
    seen = set()
    for place in (None, *range(0, 98_000, 7000), 98_001):
        matrix = b"" if place is None else bytes(2000)
        path.write_bytes(content if place is None else content[:place] + matrix + content[place + 2000 :])
        seen.add(fingerprint.weights_digest([path]))
    assert len(seen) == 16
