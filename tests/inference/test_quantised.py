"""Calibration of a model in 4 or 8 bits, on the CPU."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpn_cli.calibration.passes import run_trunk
from dpn_cli.calibration.training.heal import heal_loss
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.conversion.convert import convert
from dpn_cli.inference.adapter import add_adapter
from dpn_cli.inference.loading import load_model
from dpn_cli.inference.quantised import load_frozen
from dpn_cli.pyramid.calibration_recipe import HealRecipe
from tests.calibration.training.test_heal import PAD, examples
from tests.calibration.training.test_tuning import RECIPE, base_weights, data, run

__all__ = ["data", "examples"]


@pytest.fixture(scope="module")
def converted(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(str(tiny_llava), output=tmp_path_factory.mktemp("out") / "tiny-dpn").output


@pytest.mark.parametrize(("bits", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_the_decoder_is_quantised_and_nothing_else(converted: Path, bits: Any, kind: str) -> None:
    model = load_frozen(*open_converted(converted)[::2], bits)
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == kind}
    layers = model.text_model.layers
    expected = {name for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    assert quantised == {f"model.language_model.layers.{name}" for name in expected}
    assert len(quantised) == 8 * 7
    assert {p.dtype for p in model.text_model.routers.parameters()} == {torch.float32}


def test_gradients_are_right_after_a_forward_without_them(converted: Path, examples: Any) -> None:
    """bitsandbytes repacks 4-bit weights in such a forward on CPUs with AVX512-BF16, unless it is told not to."""
    gradients = []
    for warmed_up in (False, True):
        model = load_frozen(*open_converted(converted)[::2], "4bit")
        assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
        parameters = add_adapter(model, 2, 4.0, ["q_proj", "down_proj"], seed=0)
        for name, parameter in parameters.items():
            if ".lora_B." in name:
                nn.init.constant_(parameter, 0.05)
        trunk = run_trunk(model, examples[:2], [True, True], PAD)
        if warmed_up:
            with torch.no_grad():
                heal_loss(model, trunk, 3.0, HealRecipe())
        heal_loss(model, trunk, 3.0, HealRecipe()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
    assert all(value.abs().sum() > 0 for value in gradients[0].values())
    assert all(torch.allclose(gradients[1][name], value, rtol=1e-3, atol=1e-6) for name, value in gradients[0].items())


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_routers_and_adapter_of_a_quantised_model_go_into_the_unquantised_folder(
    converted: Path, data: Path, tmp_path: Path, bits: str
) -> None:
    folder = tmp_path / "tiny-dpn"
    shutil.copytree(converted, folder)
    heal = RECIPE.heal if bits == "4bit" else HealRecipe()
    run(folder, data, RECIPE.model_copy(update={"load_in": bits, "heal": heal}))
    assert base_weights(folder) == base_weights(converted)
    model = load_model(folder)
    assert model.is_adapted == (bits == "4bit")
    assert model.pyramid.budgets
    assert model.pyramid.calibration["load_in"] == bits
