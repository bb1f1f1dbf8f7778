"""Every registry is walked: what is registered works, and is offered wherever users are told of it."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dpn_cli.cli import cli
from dpn_cli.data.formats import FORMATS
from dpn_cli.data.loading import load_data
from dpn_cli.data.metrics import METRICS
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import DataError, RecipeError
from dpn_cli.evaluation.baselines import BASELINES, make_baseline
from dpn_cli.evaluation.baselines.baseline import Prompt
from dpn_cli.families.family import ALIASES
from dpn_cli.modeling.routers import ROUTER_VECTORS, Readable, Router, router_features
from dpn_cli.pyramid.config import ROUTER_INPUTS, PyramidConfig, RouterConfig
from dpn_cli.pyramid.presets import PRESETS
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.evaluation.naive import SHAPE
from tests.pyramids import pyramid


def help_of(command: str) -> str:
    """Return a command's help, as one line."""
    text = CliRunner().invoke(cli, [command, "--help"], terminal_width=500).output
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("name", ROUTER_INPUTS)
def test_a_router_input_goes_from_the_recipe_to_the_router(name: str) -> None:
    config = load_recipe("demo", [f"pyramid.router.input={name}"]).pyramid_config(8)
    assert PyramidConfig.from_dict(config.to_dict()).router.input == name
    masks = torch.arange(10) < torch.tensor([[1], [4], [6]])
    batch = Readable(torch.randn(2, 10, 8), *(mask.expand(2, -1) for mask in masks))
    features = router_features(batch, config.router)
    assert features.shape == (2, config.router.num_inputs, 8)
    router = Router(8, 3, config.router)
    assert router(features).shape == (2, 3)
    assert {n: tuple(p.shape) for n, p in router.named_parameters()} == config.router.tensors(8, 3)
    assert len({tuple(vector) for vector in features[0].tolist()}) == len(ROUTER_INPUTS[name])


def test_no_router_input_is_taken_that_is_not_registered() -> None:
    assert {name for names in ROUTER_INPUTS.values() for name in names} == ROUTER_VECTORS.keys()
    data = replace(pyramid(), router=RouterConfig(input="all_tokens")).to_dict()
    with pytest.raises(ValueError, match="impossible input: 'all_tokens'"):
        PyramidConfig.from_dict(data)
    with pytest.raises(RecipeError, match=f"'{next(iter(ROUTER_INPUTS))}'"):
        load_recipe("demo", ["pyramid.router.input=all_tokens"])
    with pytest.raises(KeyError):
        _ = RouterConfig(input="all_tokens").num_inputs


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_what_its_name_says(name: str) -> None:
    baseline = make_baseline(name, pyramid())
    assert baseline.name == name
    assert baseline.fit(SHAPE, [Prompt(((12, 12),), 9)], 0.6).label.startswith(name)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_tells_right_from_wrong(name: str) -> None:
    assert METRICS[name].score("B", "B") == 1 and METRICS[name].score("C", "B") == 0


def test_no_two_formats_claim_one_file(tmp_path: Path) -> None:
    (tmp_path / "data.xyz").write_text("?")
    with pytest.raises(DataError) as error:
        load_data(DataOptions(str(tmp_path / "data.xyz")))
    assert all(each.description in str(error.value) for each in FORMATS.values())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("convert", ALIASES),
        *product(("eval", "calibrate", "data"), [[each.description for each in FORMATS.values()]]),
        ("eval", [*BASELINES, *METRICS, *(metric.description for metric in METRICS.values())]),
        ("bench", BASELINES),
        ("export", PRESETS),
    ],
)
def test_help_tells_of_all_that_is_registered(command: str, words: list[str]) -> None:
    text = help_of(command)
    assert [word for word in words if word not in text] == []
