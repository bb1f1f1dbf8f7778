"""`dpn calibrate` on data with faults: what is said before any model is loaded, and what comes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpn_cli.cli import main
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration

LIGHT = ["--samples", "24", "--set", "calibration.epochs=3", "--set", "calibration.holdout=0.25", "--budget", "0.6"]


@pytest.fixture
def rows(make_converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Twenty good rows of kinds that users mix, in a working directory with an uncalibrated `tiny-dpn`."""
    folder = make_converted(calibrated=False).parent
    monkeypatch.chdir(folder)
    pixels = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for i in range(20):
        Image.fromarray(pixels.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        chat = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": "red circle"}]
        found.append({"id": i, "image": f"{i}.png", "conversations": chat})
    again = [{"from": "human", "value": "<image>\nand this ?"}, {"from": "gpt", "value": "blue square"}]
    found[3] = {"images": ["3.png", "4.png"], "conversations": found[3]["conversations"] + again}
    found[5]["conversations"] = found[5]["conversations"][:1]
    found[7] = {"conversations": [{"from": "human", "value": "what is red ?"}, {"from": "gpt", "value": "red"}]}
    found[9]["conversations"] = [{"from": "system", "value": "say one word"}, *found[9]["conversations"]]
    return found


def calibrate(rows: list[Any], *options: str) -> int:
    Path("data.json").write_text(json.dumps(rows))
    return main(["calibrate", "--model", "tiny-dpn", "--data", "data.json", *LIGHT, *options])


def test_rows_of_all_kinds_calibrate(rows: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(rows) == 0
    captured = capsys.readouterr()
    assert "Data: LLaVA JSON (`image`, `conversations` as conversation); 20 of 20 rows read" in captured.err
    assert (
        "19 with an image, 1 with several images, 1 text-only, 1 with several turns, "
        "1 to be answered by the model itself"
    ) in captured.err
    assert "rows read" not in captured.out and "held-out samples" in captured.out


def test_bad_rows_stop_the_run_before_a_model_is_loaded(
    rows: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DpnLlavaForConditionalGeneration, "from_pretrained", None)
    rows[1]["conversations"][1]["value"] = ""
    rows[15]["conversations"][0]["value"] = "<image>" + "what " * 100_000
    assert calibrate(rows) == 4
    error = capsys.readouterr().err
    assert "2 of 20 rows read are bad: row 2: an empty answer; row 16: over-long (100" in error
    assert "tokens with its images, the model takes 2048" in error
    assert "--on-bad-row skip" in error and "Traceback" not in error


def test_bad_rows_are_left_out_by_choice(rows: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows[1]["image"] = "gone.png"
    assert calibrate(rows, "--on-bad-row", "skip", "--max-bad", "4.9%") == 4
    assert "5.0%, more than --max-bad" in capsys.readouterr().err
    assert calibrate(rows, "--on-bad-row", "skip") == 0
    error = capsys.readouterr().err
    assert "bad rows: 1 (5.0%)" in error and "row 2: missing image file (no image file gone.png)" in error
