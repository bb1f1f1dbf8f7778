import json
from pathlib import Path

import pytest

from dpn_cli.cli import main
from dpn_cli.pyramid.recipe_files import available_recipes, load_recipe


def test_the_list_has_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line and line[0] in available_recipes()] == list(available_recipes())
    assert main(["recipes", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} == set(available_recipes())


def test_a_name_alone_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["recipes", "demo"], ["recipes", "show", "demo"]):
        assert main([*line, "--set", "calibration.budget=0.3", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == load_recipe("demo", ["calibration.budget=0.3"]).to_dict()


@pytest.mark.parametrize("name", available_recipes())
def test_what_show_prints_is_the_same_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", name, "--set", "calibration.learning_rate=1e-5"]) == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(text := capsys.readouterr().out)
    assert max(map(len, text.splitlines())) <= 80
    assert load_recipe(str(copy)) == load_recipe(name, ["calibration.learning_rate=1e-5"])


def test_an_unknown_recipe_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["recipes", "show", "dem"], ["recipes", "dem"]):
        assert main(line) == 2
        assert "Did you mean 'demo'?" in capsys.readouterr().err
