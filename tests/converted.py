"""Converted checkpoints, some as if calibrated, and a picture to ask them about."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dpn_cli.calibration.survey import pruned
from dpn_cli.checkpoint.headers import INDEX_FILE, read_json
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.conversion.convert import convert
from dpn_cli.pyramid.budgets import Budget
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.recipe_files import load_recipe
from dpn_cli.pyramid.route import parse_route

ROUTES = (  # of the shipped recipe
    "diverse:0.5+8x8, keep, keep, keep, keep",
    "diverse:0.5+8x8, keep, keep, attended:0.5, exit",
    "keep, pool:1x2, keep, keep, keep",
    "keep, pool:1x2, pool:2x2, keep, exit",
    "keep, keep, pool:2x2, exit, keep",
)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    pixels = np.random.default_rng(3).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture(scope="session")
def converted_factory(
    tiny_llava_factory: Callable[..., Path], tiny_tiled: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return `make(text, layout, shards, calibrated, family) -> Path`; calibrated, its routers disagree.

    Equal arguments give the same folder, which nobody may change.
    """

    @cache
    def make(text: str, layout: str, shards: int, calibrated: bool, family: str) -> Path:
        folder = tmp_path_factory.mktemp("converted") / "tiny-dpn"
        if calibrated:
            shutil.copytree(make(text, layout, shards, False, family), folder)
            pretend_calibration(folder)
        elif family == "llava":
            convert(str(tiny_llava_factory(text=text, layout=layout, shards=shards)), output=folder)
        else:
            recipe = load_recipe("llava-next", ["pyramid.min_visual_tokens=4"])
            convert(str(tiny_tiled(family, text, layout)), recipe, folder)
        return folder

    return make


@pytest.fixture
def make_converted(converted_factory: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return `make(...) -> Path` as `converted_factory` does, a folder of one's own."""

    def make(
        text: str = "llama", layout: str = "hub", shards: int = 1, calibrated: bool = True, family: str = "llava"
    ) -> Path:
        return Path(shutil.copytree(converted_factory(text, layout, shards, calibrated, family), tmp_path / "tiny-dpn"))

    return make


def pretend_calibration(folder: Path) -> None:
    """Leave what calibration leaves: some routes, routers that choose among them, a budget table and its own folder."""
    from safetensors.numpy import load_file, save_file

    config = read_json(folder / "config.json")
    found = PyramidConfig.from_dict(config["pyramid"])
    pyramid = replace(
        pruned(found, [found.full_route, *(parse_route(route, found.sites) for route in ROUTES)]),
        trade_off=2.0,
        budgets=(Budget(0.8, 1.0, 0.01), Budget(0.7, 2.0, 0.03), Budget(0.6, 3.0, 0.05)),
        calibration={"data": "mydata|2.json", "agreement": 0.98765, "agreement_interval": [0.9, 1.0]},
    )
    write_json(folder / "config.json", config | {"pyramid": pyramid.to_dict()})
    tensors = load_file(folder / "dpe.safetensors")
    needed = tuple(f".{name}" for name in pyramid.dpe_tensors(config["text_config"]["hidden_size"]))
    for name in [name for name in tensors if not name.endswith(needed)]:
        del tensors[name]
    for name, tensor in tensors.items():
        if "head" in name:
            shape = (pyramid.num_routes, *tensor.shape[1:])
            tensors[name] = np.random.default_rng(len(name)).normal(0, 1, shape).astype(np.float32)
    save_file(tensors, folder / "dpe.safetensors", metadata={"format": "pt"})
    index = read_json(folder / INDEX_FILE)
    files = {name: file for name, file in index["weight_map"].items() if file != "dpe.safetensors" or name in tensors}
    write_json(folder / INDEX_FILE, index | {"weight_map": files})
    (folder / "calibration").mkdir()
    (folder / "calibration" / "report.json").write_text("{}")
