from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.random_checkpoint import LAYOUTS, _shards, hub_config, make
from dpn_cli.checkpoint.layout import open_llava
from dpn_cli.families.tensors import llava_tensors
from dpn_cli.families.text import TEXT_MODELS


@pytest.mark.parametrize(
    ("layout", "tensors", "nbytes", "shards"),
    [("llava-1.5-7b-hf", 686, 14_126_854_144, 3), ("llava-1.5-13b-hf", 758, 26_702_989_312, 6)],
)
def test_the_layouts_are_those_of_the_hub(layout: str, tensors: int, nbytes: int, shards: int) -> None:
    config = hub_config(LAYOUTS[layout], {})
    shapes = llava_tensors(config | {"text_config": TEXT_MODELS["llama"].completed(config["text_config"])})
    assert len(shapes) == tensors
    assert 2 * sum(map(prod, shapes.values())) == nbytes
    assert len(list(_shards(shapes, 5_000_000_000))) == shards


def test_a_small_one_is_whole_and_finite(tmp_path: Path) -> None:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    folder = make(tmp_path / "small", "llava-1.5-7b-hf", text, vision, shard_bytes=5_000_000)
    checkpoint, layout = open_llava(folder)
    assert (len(checkpoint.files), layout.shape.num_layers, layout.grid) == (2, 2, (24, 24))
    for array in (array for file in checkpoint.files for array in load_file(folder / file).values()):
        assert array.dtype == np.float16 and np.isfinite(array).all()
