"""`dpn data`: what was read, how it will be asked, and what a calibration will cost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpn_cli.calibration import forecast
from dpn_cli.cli import main
from dpn_cli.exporting.export import export
from tests.runs import noise_pictures


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the speed of a layer be measured for a moment: nothing here is about how exact it is."""
    monkeypatch.setattr(forecast, "_MEASURED_S", 0.01)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise_pictures(folder, 16)
    names = sorted(path.name for path in folder.iterdir())
    rows = [{"picture": f"pictures/{name}", "question": f"what {i} ?", "answer": "red"} for i, name in enumerate(names)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def test_the_data_alone_are_shown_where_there_is_no_checkpoint(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(rows.parent)
    assert main(["data", "rows.json", "--samples", "2"]) == 0
    shown = capsys.readouterr()
    assert "Data: LLaVA JSON (`picture`, `question` and `answer`); 2 of 16 rows read" in shown.out
    assert "dpn convert MODEL" in shown.err
    assert main(["data", "rows.json", "--columns", "question=answer", "--ignore-fields", "question", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["columns"] == {"picture": "image", "answer": "question"} and found["forecast"] is None
    assert [(each["row"], each["prompt"], each["answer"]) for each in found["asked"]] == [
        (n, "red", None) for n in (1, 2, 3)
    ]
    assert found["asked"][0]["images"][0][0].endswith(
        "pictures/" + sorted(p.name for p in Path("pictures").iterdir())[0]
    )


def test_samples_are_shown_as_the_checkpoint_asks_them(
    rows: Path, make_converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["data", str(rows), "--model", str(make_converted())]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "<image>" in found["asked"][0]["prompt"] and "what 0 ?" in found["asked"][0]["prompt"]
    cost = found["forecast"]
    assert cost["seconds"] > 0 and cost["memory_bytes"] > 0 < cost["disk_bytes"]
    assert found["scan"]["with_image"] == 16 and len(found["asked"]) == 3
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert (
        "picture" in shown
        and "read as" in shown
        and "estimated" in shown
        and "measured just now" in " ".join(shown.split())
    )
    assert main([*line, "--samples", "15"]) == 0
    few = capsys.readouterr()
    assert "estimated" not in few.out and "calibration needs 16 samples" in " ".join(few.err.split())


def test_an_export_shows_the_data_without_an_estimate(
    rows: Path, make_converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(make_converted(), tmp_path / "export")
    assert main(["data", str(rows), "--model", str(tmp_path / "export"), "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert "<image>" in found["asked"][0]["prompt"] and found["forecast"] is None
    assert main(["data", str(rows), "--model", str(tmp_path / "export")]) == 0
    assert "export is an export" in " ".join(capsys.readouterr().err.split())


def test_another_teacher_is_part_of_the_estimate(
    rows: Path,
    make_converted: Callable[..., Path],
    other_llava: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(rows.parent)
    line, memory = ["data", str(rows), "--model", str(make_converted()), "--json"], []
    for further in ([], ["--teacher", str(other_llava)]):
        assert main([*line, *further]) == 0
        memory.append(json.loads(capsys.readouterr().out)["forecast"]["memory_bytes"])
    weights = (other_llava / "model.safetensors").stat().st_size
    assert memory[1] - memory[0] == pytest.approx(weights, rel=0.05), "its header is not in memory"
    assert main([*line, "--teacher", "demo"]) == 3
    assert "another vocabulary" in capsys.readouterr().err
    assert main(["data", str(rows), "--teacher", str(other_llava)]) == 2
    assert "--teacher needs a checkpoint" in capsys.readouterr().err


def test_bad_rows_end_it_as_they_end_a_calibration(
    rows: Path, make_converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows.write_text(json.dumps([*json.loads(rows.read_text()), {"picture": "gone.png", "question": "what ?"}]))
    line = ["data", str(rows), "--model", str(make_converted())]
    assert main(line) == 4
    assert "row 17: missing image file" in capsys.readouterr().err
    assert main([*line, "--on-bad-row", "skip", "--max-bad", "20%"]) == 0
    assert "bad rows: 1 (5.9%)" in capsys.readouterr().out
    assert main(["data", str(rows), "--model", str(rows.parent / "nowhere")]) == 3
