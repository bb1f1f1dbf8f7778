import json
from itertools import chain
from pathlib import Path

import pytest

from dpn_cli.cli import main
from dpn_cli.pyramid.budgets import Budget
from dpn_cli.pyramid.config import PyramidConfig
from tests.pyramids import POOLING


@pytest.fixture
def converted(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["convert", str(tiny_llava), "-o", "out", *chain.from_iterable(("--set", each) for each in POOLING)]) == 0
    )
    return tmp_path / "out"


def test_the_current_checkpoint_is_shown(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect"]) == 0
    captured = capsys.readouterr()
    assert str(converted) in captured.err
    for text in ("after layer 3", "pool:2x2,pool:2x2,keep", "vision_tower", "6–7", " 144"):
        assert text in captured.out
    assert "Budgets" not in captured.out
    assert "64 text tokens, an assumed length (--text-tokens sets it)" in captured.out


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


@pytest.mark.usefixtures("converted")
def test_a_route_is_priced_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", "--json", "--route", "1x2,1x1,1x2", "--route", "0,0,0"]) == 0
    routes = {cost["name"]: cost for cost in json.loads(capsys.readouterr().out)["routes"]}
    assert [layer["visual_tokens"] for layer in routes["1x2,1x1,1x2"]["layers"]] == [144] * 2 + [72] * 4 + [36] * 2
    assert routes["0,0,0"]["flops"] == routes["full"]["flops"] > routes["1x2,1x1,1x2"]["flops"]
    assert main(["inspect", "--route", "3x3,0,0"]) == 2
    assert "'3x3' is not an expert of site 0" in capsys.readouterr().err


def test_a_sample_of_many_images_is_refused(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--model", str(converted), "--images", "1000000000"]) == 2
    assert "0<=x<=256" in capsys.readouterr().err
