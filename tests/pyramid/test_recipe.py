import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpn_cli.errors import RecipeError
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.pyramid.recipe import Recipe
from dpn_cli.pyramid.recipe_files import available_recipes, load_recipe


def test_shipped_recipes_parse_and_are_named_after_their_file() -> None:
    assert {"demo", "llava-1.5-7b", "llava-1.5-13b", "llava-hr-7b", "llava-hr-x-13b"} <= set(available_recipes())
    for name in available_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(32, [-1, 2, 7, 15, 23]), (40, [-1, 3, 9, 19, 29]), (16, [-1, 1, 3, 7, 11])]
)
def test_fractions_become_layers(num_layers: int, expected: list[int]) -> None:
    config = load_recipe("llava-1.5-7b").pyramid_config(num_layers)
    assert [site.after_layer for site in config.sites] == expected
    assert config.routes == (config.full_route,), "nothing is offered before the survey"
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_decoder_too_shallow_for_the_sites_is_refused(num_layers: int) -> None:
    with pytest.raises(RecipeError, match="sites after layers"):
        load_recipe("llava-1.5-7b").pyramid_config(num_layers)


def test_a_site_after_the_last_layer_is_refused() -> None:
    recipe = load_recipe("demo", ["pyramid.sites=[{after_layer: 7}]", "pyramid.router.output=distortion"])
    assert recipe.pyramid_config(9).sites[0].after_layer == 7
    with pytest.raises(RecipeError, match="to 6 are"):
        recipe.pyramid_config(8)


def test_all_faults_are_reported_at_once_with_their_path() -> None:
    overrides = [
        "calibration.sampels=3",
        "calibration.routes=some",
        "pyramid.pooling=mean",
        "pyramid.sites.1.after=2",
    ]
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", overrides)
    message = str(caught.value)
    assert "calibration.sampels: unknown key. Did you mean 'samples'?" in message
    assert "calibration.routes: Input should be 'all' or Input should be a valid integer" in message
    assert "pyramid.pooling: " in message
    assert "pyramid.sites.1.after: " in message


@pytest.mark.parametrize(
    "override",
    [
        "calibration.learning_rate=.nan",
        "calibration.learning_rate=.inf",
        "calibration.budget=0",
        "calibration.budget=on",
        "calibration.samples=1.5",
        "calibration.samples=true",
        "calibration.prompts=[]",
        "pyramid.sites=[]",
        "pyramid.sites.0.after_layer=3",
        "pyramid.sites.0.rates=[[1, 2], [2, 2]]",
        "pyramid.sites.0.rates=[[1, 1], [1, 1]]",
        "pyramid.sites.0.rates=[[1, 1], [0, 2]]",
        "pyramid.sites.9.after=0.9",
        "pyramid.router.input=image",
        "name=!!binary aGk=",
        "calibration",
        "=3",
        "pyramid..sites=3",
    ],
)
def test_bad_overrides_are_refused(override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe("demo", [override])


def test_overrides_are_yaml_values() -> None:
    recipe = load_recipe(
        "demo", ["calibration.learning_rate=1e-5", "pyramid.sites.0={after: 0.1, rates: [[1, 1], [4, 4]]}"]
    )
    assert recipe.calibration.learning_rate == 1e-5
    assert recipe.pyramid.sites[0].rates == ((1, 1), (4, 4))
    assert recipe.pyramid.sites[1].rates is None


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: demo\nname: base\ncalibration: {samples: 10, seed: 3}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nname: child\ncalibration: {samples: 20}\npyramid: {sites: [{after: 0.5}]}\n")
    recipe = load_recipe(str(child))
    assert (recipe.name, recipe.calibration.samples, recipe.calibration.seed) == ("child", 20, 3)
    assert len(recipe.pyramid.sites) == 1
    assert recipe.calibration.batch_size == load_recipe("demo").calibration.batch_size


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "content", ["- 1\n", "", "name: [\n", "\tname: x\n", "name: x\nname: y\n", "1: x\n", "a: &a [*a]\n"]
)
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError):
        load_recipe(str(path))


def test_an_unknown_name_suggests_a_known_one() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'llava-1\.5-7b'"):
        load_recipe("llava-1.5-7")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe("missing.yaml")


@given(
    fractions=st.lists(st.floats(0, 0.9), min_size=1, max_size=4, unique=True).map(sorted),
    num_layers=st.integers(1, 60),
)
def test_placed_sites_always_lie_inside_and_ascend(fractions: list[float], num_layers: int) -> None:
    data = {"name": "x", "pyramid": {"sites": [{"after": f} for f in fractions]}}
    try:
        config = Recipe.from_dict(data, where="test").pyramid_config(num_layers)
    except RecipeError:
        return
    assert all(len(segment) > 0 for segment in config.segments(num_layers)[1:])


def test_the_resolved_recipe_reads_back() -> None:
    recipe = load_recipe("llava-1.5-13b", ["pyramid.sites.0={after_layer: 2}"])
    assert Recipe.from_dict(recipe.to_dict(), where="test") == recipe


def test_every_route_is_measured_on_enough_samples() -> None:
    recipe = CalibrationRecipe(routes=8)
    assert [recipe.routes_per_sample(24, count) for count in (8192, 4096, 2048, 1024, 100, 0)] == [8, 8, 13, 24, 24, 24]
    assert CalibrationRecipe().routes_per_sample(24, 4096) == 24
