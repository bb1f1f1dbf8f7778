"""Where weights may be: offloaded to memory or disk, quantised, under adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpn_cli.inference.loading import load_model
from dpn_cli.modeling.routers import RouterConfig, RouterHead
from tests.pyramids import prompt

SKIPPED = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]  # 32 wide: too narrow for bitsandbytes


def routers_of(model: Any) -> Any:
    return model.text_model.routers


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return prompt(1, 3, 5, seed=0)


def answer(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[int], list[tuple[int, ...]]]:
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist(), model.last_routes


@pytest.mark.parametrize("where", ["routers on disk", "all on disk", "too little memory"])
def test_offloaded_weights_give_the_same_answer(
    make_converted: Callable[..., Path], tmp_path: Path, inputs: dict[str, torch.Tensor], where: str
) -> None:
    folder = make_converted()
    model = load_model(folder)
    parts = {name: "cpu" for name, _ in model.named_children()}
    parts |= {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
    parts |= {f"model.language_model.{name}": "cpu" for name, _ in model.text_model.named_children()}
    parts = {name: "cpu" for name in parts if name not in ("model", "model.language_model")}
    placement: dict[str, Any] = {
        "routers on disk": {"device_map": parts | {"model.language_model.routers": "disk", "lm_head": "disk"}},
        "all on disk": {"device_map": dict.fromkeys(parts, "disk") | {"lm_head": "cpu"}},
        "too little memory": {"device_map": "auto", "max_memory": {"cpu": 900_000}},
    }[where]
    expected = answer(model, inputs)
    assert expected[1] != [(0, 0, 0)]
    assert answer(load_model(folder, **placement, offload_folder=tmp_path / "offload"), inputs) == expected


def test_learned_kernels_are_offloaded_too(make_pair: Any, inputs: dict[str, torch.Tensor]) -> None:
    from accelerate import cpu_offload

    _, model = make_pair(pooling="conv", gate="probability")
    expected = answer(model, inputs)
    assert answer(cpu_offload(model), inputs) == expected


def test_embeddings_of_an_offloaded_model_find_its_images(make_pair: Any, inputs: dict[str, torch.Tensor]) -> None:
    from accelerate import cpu_offload

    _, model = make_pair()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        expected = model(**inputs).logits
        got = cpu_offload(model)(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_quantisers_leave_the_routers_alone(
    make_converted: Callable[..., Path], inputs: dict[str, torch.Tensor], bits: dict[str, bool]
) -> None:
    from transformers import BitsAndBytesConfig

    folder = make_converted()
    config = BitsAndBytesConfig(**bits, llm_int8_skip_modules=SKIPPED)  # a list without the routers
    model = load_model(folder, quantization_config=config)
    assert type(model.text_model.layers[0].mlp.up_proj) is not nn.Linear
    expected = routers_of(load_model(folder)).state_dict()
    for name, tensor in routers_of(model).state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name])
    shape = (2, model.pyramid.router.num_inputs, 64)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(routers_of(model)[0](features), routers_of(load_model(folder))[0](features))
    answer(model, inputs)


def test_adapters_leave_the_routers_alone(make_converted: Callable[..., Path]) -> None:
    import peft

    model = peft.get_peft_model(load_model(make_converted()), peft.LoraConfig(target_modules="all-linear"))
    wrapped = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert any(".layers.0.self_attn.q_proj." in name for name in wrapped)
    assert not any("routers" in name for name in wrapped)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_a_fresh_pyramid_takes_the_full_route(make_pair: Any, inputs: dict[str, torch.Tensor], kind: str) -> None:
    """Also where its logits are a head's own: transformers initialises modules by their parameters."""
    _, model = make_pair(router=RouterConfig(kind=kind, output="logits", input="last_instruction_token"))
    fresh = type(model)(model.config).eval()
    heads = [module for module in fresh.modules() if isinstance(module, RouterHead)]
    assert len(heads) == 3 and not any(parameter.any() for head in heads for parameter in head.parameters())
    answer(fresh, inputs)
    assert fresh.last_routes == [(0, 0, 0)]


def test_autocast_leaves_the_routers_in_float32(make_pair: Any) -> None:
    _, model = make_pair()
    router = routers_of(model)[0]
    features = torch.randn(8, 4, 64, generator=torch.Generator().manual_seed(0))
    expected = router(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(features), expected)


def test_what_only_chooses_is_not_trained(make_converted: Callable[..., Path]) -> None:
    """Processes that share a training would wait for its gradients, which no loss gives."""
    model = load_model(make_converted())
    sample = prompt(1, 3, 5, seed=0)
    labels = torch.where(torch.arange(sample["input_ids"].shape[1]) > 150, sample["input_ids"], -100)
    model(**sample, labels=labels).loss.backward()
    without = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    assert not [name for name in without if "language_model" in name]
    assert not any(each.requires_grad for each in model.text_model.routers.parameters())
