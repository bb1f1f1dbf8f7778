"""What our classes override is still there in transformers: says early what a release renamed."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from dpn_cli.inference.loading import register
from dpn_cli.modeling.cache import PyramidCache
from dpn_cli.modeling.code import MODEL_CLASSES
from dpn_cli.modeling.families import MODELS
from dpn_cli.modeling.pyramid_text import PYRAMID_TEXT_MODELS
from dpn_cli.modeling.renamed import CACHE, CHECKPOINTING

LATER = {"_maybe_prepare_encoder_kwargs_for_generation": "5.16"}  # not there before; then it is not needed
CLASSES = [
    *PYRAMID_TEXT_MODELS.values(), *MODELS, *MODELS.values(), *(each.inner_class for each in MODELS.values()),
    PyramidCache,
]  # fmt: skip


def stock_classes(ours: type) -> list[type]:
    return [each for each in ours.__mro__ if each.__module__.startswith("transformers.")]


@pytest.mark.parametrize("ours", CLASSES, ids=lambda each: each.__name__)
def test_what_is_overridden_is_there(ours: type) -> None:
    marked = {
        name: value
        for each in ours.__mro__
        if each.__module__.startswith("dpn_cli.")
        for name, value in vars(each).items()
        if getattr(value, "__override__", False)
    }
    assert marked
    for name, value in marked.items():
        if Version(transformers.__version__) < Version(LATER.get(name, "0")):
            continue
        stock = next((vars(each)[name] for each in stock_classes(ours) if name in vars(each)), None)
        assert stock is not None, (
            f"transformers {transformers.__version__} has no {name}, which {ours.__name__} overrides"
        )
        taken = inspect.signature(value).parameters
        if not any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in taken.values()):
            assert inspect.signature(stock).parameters.keys() == taken.keys(), f"{name} has other arguments now"


@pytest.mark.parametrize("name", [
    "_keep_in_fp32_modules_strict", "_can_compile_fullgraph", "_init_weights", f"{CHECKPOINTING}_enable",
])  # fmt: skip
def test_what_is_set_or_called_is_there(name: str) -> None:
    assert hasattr(transformers.PreTrainedModel, name)


@pytest.mark.parametrize("text", PYRAMID_TEXT_MODELS.values(), ids=lambda each: each.__name__)
def test_layers_take_the_cache_by_the_name_that_masks_do(text: Any) -> None:
    stock = stock_classes(text)[0]
    layer = getattr(inspect.getmodule(stock), stock.__name__.replace("Model", "DecoderLayer"))
    assert CACHE in inspect.signature(layer.forward).parameters
    assert CACHE in inspect.signature(transformers.masking_utils.create_causal_mask).parameters


def test_every_auto_class_knows_our_models() -> None:
    register()
    for config, model in MODELS.items():
        for name in MODEL_CLASSES:
            assert getattr(transformers, name)._model_mapping[config] is model
        with torch.device("meta"):
            assert type(transformers.AutoModelForMultimodalLM.from_config(config())) is model
