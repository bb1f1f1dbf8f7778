"""What calibration and evaluation hold in memory does not grow with the samples: no pixels, and no features."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_cli import cli
from dpn_cli.calibration.features import StoredFeatures
from dpn_cli.calibration.fitting import fit_routers
from dpn_cli.calibration.policy import Policy
from dpn_cli.calibration.rollout import RouteTable
from dpn_cli.data import encoding, samples
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.data.samples import StoredImage
from dpn_cli.demo import pictures
from tests.calibration.test_policy import make_routers, make_table
from tests.calibration.test_rollout import examples, measured
from tests.runs import noise_pictures

SAMPLES, BATCH = 16, 2
CALIBRATE = [
    *("--experts", "exit", "--samples", str(SAMPLES)),
    *(word for key, value in {"epochs": 1, "answer_tokens": 2, "batch_size": BATCH, "survey.samples": 2}.items()
      for word in ("--set", f"calibration.{key}={value}")),
]  # fmt: skip
EVAL = ["--max-new-tokens", "2", "--batch-size", str(BATCH)]


@pytest.mark.parametrize(("command", "options"), [("calibrate", CALIBRATE), ("eval", EVAL)])
def test_pixels_are_in_memory_a_batch_at_a_time(
    make_converted: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    options: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    data = noise_pictures(tmp_path / "pictures", SAMPLES)
    pixels = Alive(monkeypatch, encoding, "_visual", lambda visual: visual["pixel_values"])
    images = Alive(monkeypatch, samples, "open_image", lambda image: image)
    folder = make_converted(calibrated=command == "eval")
    assert cli.main([command, "--model", str(folder), "--data", str(data), *options]) == 0
    assert pixels.count >= SAMPLES and images.count >= SAMPLES
    assert max(pixels.most, images.most) <= 2 * BATCH, "those of a batch, and of the one before it"


class Alive:
    """Counts the objects that a function makes, and the most that are in memory at once."""

    def __init__(self, patch: pytest.MonkeyPatch, module: Any, name: str, part: Callable[[Any], Any]) -> None:
        self.made: list[weakref.ref[Any]] = []
        self.most = 0
        real = getattr(module, name)

        def make(*args: Any) -> Any:
            result = real(*args)
            self.made.append(weakref.ref(part(result)))
            self.most = max(self.most, sum(each() is not None for each in self.made))
            return result

        patch.setattr(module, name, make)

    @property
    def count(self) -> int:
        return len(self.made)


def test_the_demo_draws_a_picture_when_it_is_asked_for() -> None:
    drawn = list(pictures.samples("heldout", 3))
    for sample, expected in zip(load_data(DataOptions("demo"), split="heldout", limit=3).samples, drawn, strict=True):
        assert all(isinstance(image, StoredImage) for image in sample.images)
        [picture] = sample.open_images()
        assert picture.tobytes() == expected.image.tobytes()


def test_features_in_a_file_are_those_in_memory(make_pair: Any, tmp_path: Path) -> None:
    _, model = make_pair()
    expected = measured(model, examples()).features
    features = measured(model, examples(), features=tmp_path / "features.bin").features
    assert isinstance(features, StoredFeatures) and isinstance(expected, torch.Tensor)
    assert torch.equal(features[torch.arange(4)], expected)
    assert torch.equal(features.part([3, 1])[torch.tensor([1])], expected[[1]])


def test_routers_that_are_fitted_from_a_file_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    table = make_table(200)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    fitted = []
    for whole in (table, stored(table, tmp_path / "features.bin")):
        routers, held = make_routers(), whole.part(rows[:40])
        fit_routers(routers, whole.part(rows[40:]), held, epochs=6, learning_rate=1e-2, seed=0)
        fitted.append((routers.state_dict(), Policy.of(routers, held).logits))
    (state, logits), (other, others) = fitted
    assert torch.equal(logits, others)
    assert all(torch.equal(value, other[name]) for name, value in state.items())


def stored(table: RouteTable, path: Path) -> RouteTable:
    everything = table.features[torch.arange(len(table.distortion))]
    features = StoredFeatures.create(path, tuple(everything.shape))  # type: ignore[arg-type]
    features[torch.arange(len(everything))] = everything
    assert np.fromfile(path, np.float16).size == everything.numel()
    return RouteTable(table.tree, features, table.offered, table.distortion, table.agreement, table.fraction)
