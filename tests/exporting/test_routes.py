"""A fixed route in an export, and the model without routers that takes it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpn_cli.checkpoint.headers import Checkpoint, read_json
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import UsageError
from dpn_cli.exporting.export import export
from dpn_cli.exporting.options import ExportOptions
from dpn_cli.exporting.routes import exported_pyramid
from dpn_cli.inference.loading import load_model
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.exporting.test_export import in_fresh_process
from tests.exports import question

ROUTE = "keep,1x2,2x2,keep,exit"


def test_a_static_export_is_the_model_with_that_route_forced(
    make_converted: Callable[..., Path], picture: Path, tmp_path: Path
) -> None:
    folder = make_converted()
    done = export(folder, tmp_path / "out", ExportOptions(static=ROUTE))
    assert done.pyramid.static_route == (0, 1, 1, 0, 1) and not done.pyramid.budgets and not done.pyramid.calibration
    assert not any("routers" in name for name in Checkpoint.open(tmp_path / "out").tensors)
    inputs = question(folder, picture)
    routed, static = load_model(folder), load_model(tmp_path / "out")
    routed.set_route((0, 1, 1, 0, 1))
    with torch.no_grad():
        assert torch.equal(routed(**inputs).logits, static(**inputs).logits)
    assert [tuple(route) for route in static.last_routes] == [(0, 1, 1, 0, 1)]
    with pytest.raises(ValueError, match="has the fixed route"):
        static.set_budget(0.7)


@pytest.fixture
def gated(tiny_llava: Path, tmp_path: Path) -> Path:
    """A checkpoint whose routers gate what they pool, and disagree."""
    folder = convert(str(tiny_llava), load_recipe("llava-1.5-7b-paper"), tmp_path / "tiny-dpn").output
    tensors = load_file(folder / "dpe.safetensors")
    generator = torch.Generator().manual_seed(0)
    heads = {name: torch.randn(each.shape, generator=generator) for name, each in tensors.items() if "head" in name}
    save_file(tensors | heads, folder / "dpe.safetensors", metadata={"format": "pt"})
    return folder


@torch.inference_mode()
def test_a_static_export_of_a_gated_pyramid_keeps_the_gate(gated: Path, picture: Path, tmp_path: Path) -> None:
    inputs = question(gated, picture)
    routed = load_model(gated)
    expected = routed(**inputs).logits
    [route] = routed.last_routes
    assert any(route)
    export(gated, tmp_path / "out", ExportOptions(static=",".join(map(str, route))))
    static = load_model(tmp_path / "out")
    assert torch.equal(static(**inputs).logits, expected) and static.last_routes == [route]
    shape, grids = static.text_model.shape, [(12, 12)]
    costs = [flops_fraction(shape, model.pyramid, route, grids, 9) for model in (static, routed)]
    assert costs[0] == costs[1] > flops_fraction(shape, replace(static.pyramid, gate="none"), route, grids, 9)


@torch.inference_mode()
def test_an_old_static_export_of_a_gated_pyramid_stays_ungated(gated: Path, picture: Path, tmp_path: Path) -> None:
    """It was written without routers, and its config.json as the routed one's with the route."""
    config = read_json(gated / "config.json")
    write_json(gated / "config.json", config | {"pyramid": config["pyramid"] | {"gate": "none"}})
    export(gated, tmp_path / "out", ExportOptions(static="1x2,1x1,2x2"))
    inputs = question(gated, picture)
    expected = load_model(tmp_path / "out")(**inputs).logits
    old = read_json(tmp_path / "out" / "config.json")
    write_json(tmp_path / "out" / "config.json", old | {"pyramid": old["pyramid"] | {"gate": "probability"}})
    model = load_model(tmp_path / "out")
    assert torch.equal(model(**inputs).logits, expected)
    assert model.pyramid.gate == "none" and not model.pyramid.has_routers


@pytest.mark.slow
def test_a_static_export_loads_where_dpn_is_not_installed(
    make_converted: Callable[..., Path], picture: Path, tmp_path: Path
) -> None:
    done = export(make_converted(), tmp_path / "out", ExportOptions(static=ROUTE))
    found = in_fresh_process(tmp_path / "out", picture, tmp_path)
    assert not any(found["keys"].values()) and list(map(tuple, found["routes"])) == [done.pyramid.static_route]


def test_the_card_of_a_static_export_says_what_it_costs(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    export(make_converted(), tmp_path / "out", ExportOptions(static="0,0,0,0,0"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Route: fixed, keep,keep,keep,keep,keep, which takes 1.000 of the original's prefill FLOPs" in card
    assert "Calibration" not in card and "set_budget" not in card and "small routers" not in card


def test_what_no_route_allows_is_refused(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_converted()
    config = read_json(folder / "config.json")
    with pytest.raises(UsageError, match="give --static or --budget, not both"):
        export(folder, tmp_path / "out", ExportOptions(static="0,0,0,0,0", budget=0.7))
    with pytest.raises(UsageError, match="needs a grid of tokens"):
        export(folder, tmp_path / "out", ExportOptions(static="diverse:0.5+8x8,1x2,keep,keep,keep"))
    assert read_json(folder / "config.json") == config


@pytest.mark.parametrize(
    ("data", "exported"),
    [("/home/me/secret/my.json", "my.json"), ("owner/data", "owner/data"), ("demo", "demo"), (None, None)],
)
def test_a_path_of_somebodys_disk_is_not_published(
    make_converted: Callable[..., Path], data: str | None, exported: str | None
) -> None:
    _, layout, pyramid = open_converted(make_converted(calibrated=False))
    pyramid = replace(pyramid, calibration={"data": data, "agreement": 0.9})
    assert exported_pyramid(pyramid, layout, None, None).calibration == {"data": exported, "agreement": 0.9}
