"""Leaving out the vision layers that no feature passes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpn_cli.checkpoint.headers import Checkpoint, read_json
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.errors import CheckpointError
from dpn_cli.exporting.export import export
from dpn_cli.exporting.options import ExportOptions
from dpn_cli.inference.loading import load_model
from tests.exports import question


@pytest.mark.parametrize(("layer", "kept", "renumbered"), [(-2, 2, -1), (1, 1, -1), (-1, 3, -1), (-4, 1, -2)])
def test_without_unused_layers_the_outputs_are_the_same(
    make_converted: Callable[..., Path], picture: Path, tmp_path: Path, layer: int, kept: int, renumbered: int
) -> None:
    folder = make_converted()
    write_json(folder / "config.json", read_json(folder / "config.json") | {"vision_feature_layer": layer})
    export(folder, tmp_path / "whole")
    done = export(folder, tmp_path / "out", ExportOptions(drop_unused=True))
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["vision_config"]["num_hidden_layers"], config["vision_feature_layer"]) == (kept, renumbered)
    whole = Checkpoint.open(tmp_path / "whole").tensors
    gone = whole.keys() - Checkpoint.open(tmp_path / "out").tensors.keys()
    assert {name.split(".")[4] for name in gone} == {str(i) for i in range(kept, 3)}
    assert done.num_tensors == len(whole) - len(gone)
    inputs = question(folder, picture)
    with torch.no_grad():
        logits = [load_model(path)(**inputs).logits for path in (folder, tmp_path / "out")]
    assert torch.equal(*logits)


def test_a_feature_layer_that_is_not_there_is_refused(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_converted()
    write_json(folder / "config.json", read_json(folder / "config.json") | {"vision_feature_layer": -9})
    with pytest.raises(CheckpointError, match="has no feature layer -9"):
        export(folder, tmp_path / "out", ExportOptions(drop_unused=True))
