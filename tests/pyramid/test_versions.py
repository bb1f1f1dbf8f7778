"""Folders of earlier versions keep loading, and mean the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.conversion.convert import convert
from dpn_cli.inference.loading import load_model
from dpn_cli.pyramid.config import PyramidConfig, RouterConfig, Site
from dpn_cli.pyramid.experts import KEEP, Expert, pool
from dpn_cli.pyramid.recipe import Recipe
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.pyramids import POOLING, collate, ragged_batch, scramble_routers

VERSION_1 = {
    "version": 1,
    "sites": [{"after_layer": layer, "rates": [[1, 1], [1, 2], [2, 2]]} for layer in (1, 3, 5)],
    "pooling": "avg",
    "gate": "none",
    "positions": "persistent",
    "rounding": "ceil",
    "router": {
        "kind": "mlp", "hidden_ratio": 4, "input": "with_summaries", "token_id": None, "output": "distortion",
    },
    "prepooling": 1,
    "min_visual_tokens": 16,
    "min_input_tokens": 1,
    "static_route": None,
    "answer_cue": [5, 6],
    "budgets": [[1.0, 0.0, 0.0], [0.5, 0.3, 0.1]],
    "calibration": {"data": "x"},
    "lambda": 0.3,
}  # fmt: skip


def test_version_1_is_a_pyramid_that_pools() -> None:
    config = PyramidConfig.from_dict(VERSION_1)
    assert config.sites == tuple(Site(layer, pool((1, 1), (1, 2), (2, 2))) for layer in (1, 3, 5))
    assert config.routes is None and config.router == RouterConfig() and config.trust(0.3) == 1
    again = json.loads(json.dumps(config.to_dict()))
    assert again["version"] == 2 and again["sites"][0]["experts"] == ["keep", "pool:1x2", "pool:2x2"]
    assert PyramidConfig.from_dict(again) == config


def test_a_folder_of_version_1_gives_the_same_logits(tiny_llava: Path, tmp_path: Path) -> None:
    """The routers' tensors have the names and shapes that they had; config.json is as the first version wrote it."""
    folder = convert(
        str(tiny_llava),
        load_recipe("llava-1.5-7b", [*POOLING, "pyramid.min_visual_tokens=16", "pyramid.router.input=with_summaries"]),
        tmp_path / "out",
    )
    model = load_model(folder.output)
    scramble_routers(model, seed=7)
    model.save_pretrained(tmp_path / "new")
    config = read_json(tmp_path / "new" / "config.json")
    assert config["pyramid"]["version"] == 2
    batch = collate(ragged_batch())
    found = {}
    for name, pyramid in (("new", {**config["pyramid"], "lambda": 0.3}), ("old", {**VERSION_1, "budgets": []})):
        write_json(tmp_path / "new" / "config.json", config | {"pyramid": pyramid})
        loaded = type(model).from_pretrained(tmp_path / "new").eval()
        with torch.no_grad():
            found[name] = loaded(**batch).logits, loaded.last_routes
    assert torch.equal(found["new"][0], found["old"][0])
    assert found["new"][1] == found["old"][1] and len(set(found["old"][1])) > 1


def test_a_recipe_of_the_first_version_still_makes_the_papers_pyramid() -> None:
    data: dict[str, Any] = {
        "name": "mine",
        "pyramid": {
            "sites": [{"after": 0.5, "rates": [[1, 1], [2, 2]]}],
            "router": {"hidden_ratio": 4, "input": "with_summaries", "output": "distortion"},
        },
    }
    config = Recipe.from_dict(data, where="test").pyramid_config(8)
    assert config.sites == (Site(3, (KEEP, Expert("pool", cells=(2, 2)))),) and config.routes is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 3}, "reads versions 1 and 2"),
        ({"routes": [[1, 0]]}, "first route of a pyramid must be the full one"),
        ({"routes": [[0, 0], [0, 0]]}, "all must differ"),
        ({"routes": [[0, 0], [0, 9]]}, "does not fit the pyramid's sites"),
        ({"routes": [[0, 0]], "mean_distortions": [0.0, 1.0]}, "a mean loss for each"),
        ({"routes": None}, "a pyramid lists its routes if"),
        ({"gate": "probability"}, "a gate needs routers that score experts"),
        ({"pooling": "conv"}, "with conv pooling all experts must pool"),
        ({"sites": [{"after_layer": 1, "experts": ["diverse:0.5"]}]}, "must be keep"),
        ({"sites": [{"after_layer": 1, "experts": ["keep", "best"]}]}, "'best' is not an expert"),
        ({"sites": [{"after_layer": -2, "experts": ["keep"]}]}, "cannot be after layer -2"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], complaint: str) -> None:
    menu = ["keep", "diverse:0.5", "exit"]
    data = {
        "version": 2,
        "sites": [{"after_layer": -1, "experts": menu}, {"after_layer": 2, "experts": menu}],
        "routes": [[0, 0], [1, 2]],
        "router": {"output": "routes"},
    }
    assert PyramidConfig.from_dict(data).num_scores(0) == 2
    with pytest.raises(ValueError, match=complaint):
        PyramidConfig.from_dict(data | change)


def test_routers_of_listed_routes_grow_with_the_routes(tiny_llava: Path, tmp_path: Path) -> None:
    folder = convert(str(tiny_llava), output=tmp_path / "out").output
    model = load_model(folder)
    assert model.pyramid.routes == (model.pyramid.full_route,)
    assert {len(router.head.bias) for router in model.text_model.routers} == {1}
    shapes: Callable[[int], Any] = model.pyramid.dpe_tensors
    assert all(tuple(model.text_model.get_parameter(name).shape) == shape for name, shape in shapes(64).items())
