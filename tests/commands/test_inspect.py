import json
from pathlib import Path

import pytest

from dpn_cli.cli import main
from dpn_cli.modeling.pyramid_config import Budget, PyramidConfig


@pytest.fixture
def converted(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(tiny_llava), "-o", "out"]) == 0
    return tmp_path / "out"


def test_the_current_checkpoint_is_shown(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect"]) == 0
    captured = capsys.readouterr()
    assert str(converted) in captured.err
    for text in ("after layer 3", "2×2 wherever offered", "vision_tower", "6–7", "144 · "):
        assert text in captured.out
    assert "Budgets" not in captured.out


def test_budgets_are_shown_once_measured(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = converted / "config.json"
    config = json.loads(path.read_text())
    pyramid = PyramidConfig.from_dict(config["pyramid"]).to_dict()
    pyramid["budgets"] = [[0.5, 0.37, 0.058]]
    assert PyramidConfig.from_dict(pyramid).budgets == (Budget(0.5, 0.37, 0.058),)
    path.write_text(json.dumps(config | {"pyramid": pyramid}))
    capsys.readouterr()
    assert main(["inspect", "--model", str(converted)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "0.37" in captured.out
    assert "0.058" in captured.out


def test_json_of_an_unconverted_model(tiny_llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_llava), "--json", "--text-tokens", "6"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["sample"] == {"grids": [[12, 12]], "text_tokens": 6}
    assert data["pyramid"] is None


@pytest.mark.usefixtures("converted")
def test_two_names_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "out", "--model", "out"]) == 2
    assert "not both" in capsys.readouterr().err
