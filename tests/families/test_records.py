"""Every record is held against transformers, and every table that derives from it against a model."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel

from dpn_cli.families.family import FAMILIES, IMAGE_PROCESSORS, Family
from dpn_cli.families.text import TEXT_MODELS, TextModel
from dpn_cli.families.vision import VISION_TOWERS, VisionTower
from dpn_cli.modeling.experts.attention import instruction_attention
from dpn_cli.modeling.families import MODELS
from dpn_cli.modeling.pyramid_text import PYRAMID_TEXT_MODELS
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.experts import pool
from tests.conftest import tiny_text_config

texts = pytest.mark.parametrize("text", TEXT_MODELS.values(), ids=TEXT_MODELS)
towers = pytest.mark.parametrize("tower", VISION_TOWERS.values(), ids=VISION_TOWERS)
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def assert_defaults(config: Any, defaults: Any) -> None:
    assert {key: getattr(config, key) for key in defaults} == defaults


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@texts
def test_the_defaults_of_a_text_model_are_those_of_transformers(text: TextModel) -> None:
    config = AutoConfig.for_model(text.model_type)
    assert_defaults(config, text.defaults)
    assert text.has_window({}) == text.has_window(config.to_dict())
    assert not text.has_window({**text.defaults, **text.full_attention})


@texts
def test_the_tensors_of_a_text_model_are_those_of_its_pyramid(text: TextModel) -> None:
    pyramid = PyramidConfig(sites=(Site(0, pool((1, 1), (2, 2))),), pooling="conv")
    for changes in ({}, *({key: True} for key in text.biased_where)):
        config = tiny_text_config(text.model_type)  # type: ignore[arg-type]
        config.update({"num_hidden_layers": 2, "head_dim": 24, **changes})
        with torch.device("meta"):
            model = PYRAMID_TEXT_MODELS[text.model_type]._from_config(config, pyramid=pyramid)
        assert shapes_of(model) == text.tensors(config.to_dict()) | pyramid.dpe_tensors(config.hidden_size)  # type: ignore[arg-type]


@texts
def test_the_pyramid_of_a_text_model_is_a_class_like_any_other(text: TextModel) -> None:
    ours = PYRAMID_TEXT_MODELS[text.model_type]
    assert pickle.loads(pickle.dumps(ours)) is ours
    assert issubclass(ours, getattr(transformers, text.class_name)) and ours.__name__ == f"Pyramid{text.class_name}"


@texts
@torch.no_grad()
def test_the_attention_scorer_gives_the_models_own_attention(text: TextModel) -> None:
    """Held against eager attention, with norms and biases that are not what fresh ones are."""
    config = copy.deepcopy(tiny_text_config(text.model_type))  # type: ignore[arg-type]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: Any = PYRAMID_TEXT_MODELS[text.model_type]._from_config(config, pyramid=PyramidConfig(sites=()))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.normal_()
    embeds, valid = torch.randn(2, 9, config.hidden_size), torch.ones(2, 9, dtype=torch.long)
    valid[1, :3] = 0
    output = model(inputs_embeds=embeds, attention_mask=valid, output_attentions=True, output_hidden_states=True)
    instruction = torch.tensor([6, 8])
    for layer in (0, 3):
        state = model.start(output.hidden_states[layer], valid, torch.arange(9).expand(2, -1))
        ours = instruction_attention(model, replace(state, instruction=instruction), layer)
        expected = output.attentions[layer].mean(1)[torch.arange(2), instruction]
        assert (ours - expected).abs().max() < 1e-6


@towers
def test_the_record_of_a_vision_tower_is_that_of_its_class(tower: VisionTower) -> None:
    config = AutoConfig.for_model(tower.model_type)
    assert_defaults(config, tower.defaults)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert shapes_of(model) == tower.tensors(config.to_dict())
    assert tower.is_stock == type(model).__module__.startswith("transformers.")


@families
def test_the_record_of_a_family_is_that_of_its_classes(family: Family) -> None:
    config = AutoConfig.for_model(family.model_type)
    assert config.vision_feature_select_strategy == family.select_strategy
    assert config.vision_feature_layer == family.feature_layer
    assert family.image_processor in IMAGE_PROCESSORS and hasattr(transformers, family.processor)
    [model] = [model for each, model in MODELS.items() if each.model_type == family.converted_type]
    assert model.__name__ == family.architecture


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_the_defaults_of_an_image_processor_are_those_of_transformers(name: str) -> None:
    processor, defaults = getattr(transformers, f"{name}Pil"), IMAGE_PROCESSORS[name]
    for key, value in ({"do_center_crop": None, "crop_size": None, "do_pad": None} | defaults).items():
        assert getattr(processor, key, None) == value, key
