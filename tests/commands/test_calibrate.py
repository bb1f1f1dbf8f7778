"""`dpn calibrate` on data with faults: what is said before any model is loaded, and what comes of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpn_cli.cli import main
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration
from dpn_cli.workspace import current
from tests.data.test_data import bomb
from tests.runs import FEW, digests, options

LEARNT = ["--set", "calibration.predictors.samples=20"]
LIGHT = [*options({**FEW, "samples": 24}), "--budget", "0.6"]


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


def calibrate(rows: list[Any] | str, *options: str) -> int:
    Path("data.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return main(["calibrate", "--model", "tiny-dpn", "--data", "data.json", *LIGHT, *options])


def test_rows_of_all_kinds_calibrate(rows: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(rows) == 0
    captured = capsys.readouterr()
    assert "Data: LLaVA JSON (`image`, `conversations` as conversation); 20 of 20 rows read" in captured.err
    assert (
        "19 with an image, 1 with several images, 1 text-only, 1 with several turns, 1 to be answered by the teacher"
    ) in captured.err
    assert "rows read" not in captured.out and "held-out samples" in captured.out


def test_results_are_replaced_on_request_only_and_the_checkpoint_worked_on_last_is_current(
    rows: list[Any], tiny_llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(rows) == 0
    before = digests(Path("tiny-dpn"))
    assert calibrate(rows) == 2
    assert "is calibrated already, on data.json for budget 0.6: copy the folder" in capsys.readouterr().err
    Path("tiny-dpn/calibration/state").mkdir()  # as a killed calibration leaves it
    assert calibrate(rows, "--restart") == 2, "that begins another one"
    assert "pass --force to replace it" in capsys.readouterr().err
    Path("tiny-dpn/calibration/state").rmdir()
    assert digests(Path("tiny-dpn")) == before
    assert main(["convert", str(tiny_llava), "-o", "other"]) == 0
    assert current(None) == Path("other").resolve()
    capsys.readouterr()
    assert calibrate(rows, "--force", "--seed", "1") == 0
    assert "in place of those of the calibration on data.json for budget 0.6" in capsys.readouterr().err
    assert digests(Path("tiny-dpn")) != before
    assert current(None) == Path("tiny-dpn").resolve()


def test_the_demo_replaces_nothing_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo-dpn", "demo-dpn-export"):
        folder = tmp_path / "work" / name
        folder.mkdir(parents=True)
        assert main(["demo", "-o", "work"]) == 2
        assert f"work/{name} exists: choose another --output, or pass --force" in capsys.readouterr().err
        assert list(folder.iterdir()) == [] and list(folder.parent.iterdir()) == [folder]
        folder.rmdir()


def test_the_source_of_a_linked_checkpoint_stays_as_it_is(rows: list[Any], tiny_llava: Path) -> None:
    source = Path(shutil.copytree(tiny_llava, "source"))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert main(["convert", "source", "-o", "tiny-dpn", "--link", "--force"]) == 0
    assert calibrate(rows) == 0
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.fixture
def faulty(rows: list[dict[str, Any]]) -> str:
    """The rows as JSON, with every kind of fault that users bring in some of them."""
    rows[1]["conversations"][1]["value"] = ""
    Path("noise.png").write_bytes(b"no picture")
    rows[2]["image"] = "noise.png"
    bomb(Path("bomb.png"), 60_000, 60_000)
    rows[11]["image"] = "bomb.png"
    rows[13]["conversations"][0]["value"] = "<image><image> what is this ?"
    rows[15]["conversations"][0]["value"] = "<image>" + "what " * 100_000
    for i in range(20, 40):
        rows.append({**rows[0], "id": i})
    return json.dumps(rows).removesuffix("]") + ",]"


def test_every_fault_stops_the_run_before_a_model_is_loaded(
    faulty: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DpnLlavaForConditionalGeneration, "from_pretrained", None)
    assert calibrate(faulty, "--samples", "40") == 4
    error = capsys.readouterr().err
    assert (
        "bad: row 2: an empty answer; row 3: image cannot be decoded (noise.png: not a known image format); " in error
    )
    assert "row 12: image too large (" in error and "row 14: more <image> than images (" in error
    assert "row 16: too long (100" in error and "tokens with its images, but the model takes 2048" in error
    assert "row 41: not JSON (" in error and "a comma is followed by no row" in error
    assert "--on-bad-row skip" in error and "Traceback" not in error


def test_text_that_is_not_read_stops_the_run_or_is_left_out_by_choice(
    rows: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in rows if "image" in row]
    for row in rows:
        row["request"] = row.pop("conversations")[0]["value"]
    assert calibrate(rows) == 4
    error = capsys.readouterr().err
    assert "(`request`, of the fields " in error and "--ignore-fields" in error and "question: question, " in error
    assert calibrate(rows, "--ignore-fields", "request", "--budget", "0.01") == 2
    error = capsys.readouterr().err
    assert "stock prompts); 18 of 18 rows read" in error and "out of reach" in error, "only the budget is refused"


@pytest.mark.slow
def test_every_fault_is_left_out_by_choice(faulty: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(faulty, "--samples", "40", "--on-bad-row", "skip", "--max-bad", "20%") == 0
    assert "bad rows: 6 (14.6%)" in capsys.readouterr().err


def test_bad_rows_are_left_out_by_choice(rows: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows[1]["image"] = "gone.png"
    assert calibrate(rows, "--on-bad-row", "skip", "--max-bad", "4.9%") == 4
    assert "5.0%, more than --max-bad" in capsys.readouterr().err
    assert calibrate(rows, "--on-bad-row", "skip") == 0
    error = capsys.readouterr().err
    assert "bad rows: 1 (5.0%)" in error and "row 2: missing image file (gone.png)" in error


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--experts", "diverse,salent"], "'salent' is not one of keep, pool, pick, diverse,"),
        (["--experts", "stride"], "has experts of the kinds stride"),
        (["--experts", "pool", "--budgets-only"], "leave out --experts"),
        (["--set", "calibration.survey.routes=1"], "calibration.survey.routes"),
    ],
)
def test_experts_that_are_not_to_be_had_are_refused_before_the_work(
    rows: list[Any], capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert calibrate(rows, *options) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err and "trying" not in captured.err and captured.out == ""


def test_the_survey_says_what_it_tried(rows: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(rows, "--experts", "diverse,exit", "--set", "calibration.survey.samples=48") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "trying 11 routes" in said, said
    assert "routes on 14 samples; the" in said, said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", str(2**64)], "is not in the range"),
        (["--samples", "1" + "0" * 30], "is not in the range"),
        (["--samples", "1"], "1 is not in the range 2<=x"),
        (["--set", f"calibration.seed={2**64}"], "calibration.seed: Input should be less than or equal to"),
        (["--set", "calibration.samples=1" + "0" * 30], "calibration.samples: Input should be less"),
        (["--set", "pyramid.attention=plain"], "--set pyramid.attention: a calibration takes calibration.KEY alone"),
        (["--set", "name=mine"], "what belongs to the pyramid is set when it is made, with `dpn convert --set`"),
        (["--set", "calibration.heal.steps=7"], "--set calibration.heal.steps has no effect without"),
        (["--set", "calibration.paper.steps=7", "--heal", "lora"], "calibration.paper.steps has no effect without"),
        (["--set", "calibration.objective=paper", "--heal", "lora"], "so nothing is healed: leave out --heal"),
        (["--budgets-only", "--set", "calibration.epochs=3"], "leave out --set calibration.epochs; it takes calib"),
        (["--heal-only", "--budgets-only"], "leave one out"),
        (["--heal-only", "--heal", "none"], "contradict each other"),
        (["--heal-only", "--set", "calibration.heal.method=none"], "contradict each other"),
        (["--heal-only", "--experts", "pool"], "leave out --experts"),
        (["--heal-only", "--set", "calibration.survey.routes=4"], "leave out --set calibration.survey.routes"),
        (
            ["--set", "calibration.holdout=0.999", "--samples", "20", *LEARNT],
            "leaves 0 to fit routers to, which need 4",
        ),
    ],
)
def test_what_no_calibration_can_have_is_refused(
    make_converted: Callable[..., Path], options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--model", str(make_converted()), "--data", "demo", "--force", *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
