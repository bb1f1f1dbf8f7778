"""Baselines that reduce images before the language model, against naive references."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dpn_cli.errors import UsageError
from dpn_cli.evaluation.baselines.baseline import Baseline, Fitted, Prompt
from dpn_cli.evaluation.baselines.downsampling import FeaturePooling, ImageDownsampling
from dpn_cli.evaluation.baselines.static import StaticPyramid
from tests.evaluation.naive import SHAPE, Naive, assert_batch_equals_one_by_one
from tests.pyramids import IMAGE, VISUAL, prompt

BASELINES = [ImageDownsampling((7, 8)), FeaturePooling((7, 8))]


def tower(stock: Any, pixels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Return the features that the projector takes, [images, N, C]."""
    states = stock.model.vision_tower(pixels, output_hidden_states=True, **kwargs).hidden_states
    return states[stock.config.vision_feature_layer][:, 1:]


def shorter(sample: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Return a prompt whose image has `count` tokens."""
    ids = sample["input_ids"][0]
    surplus = (ids == IMAGE).cumsum(0) > count
    return sample | {"input_ids": ids[~(surplus & (ids == IMAGE))][None]}


def coarse_positions(sample: dict[str, torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Return the positions of a prompt whose image of 12×12 patches became coarser: the mean of what a token covers."""
    first = int((sample["input_ids"][0] == IMAGE).nonzero()[0])
    rows = [12 / height * (i + 0.5) - 0.5 for i in range(height)]
    columns = [12 / width * (i + 0.5) - 0.5 for i in range(width)]
    grid = [first + 12 * row + column for row in rows for column in columns]
    behind = sample["input_ids"].shape[1] - first - VISUAL
    return torch.tensor([[*range(first), *grid, *range(first + VISUAL, first + VISUAL + behind)]])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "features"])
def test_coarser_grids_equal_a_shorter_prompt(make_pair: Any, kind: str) -> None:
    stock, model = make_pair(attn="eager")
    sample = prompt(1, 3, 5, seed=0)
    if kind == "image":
        small = F.interpolate(sample["pixel_values"], (6 * 4, 6 * 4), mode="bicubic", antialias=True)
        features = tower(stock, small, interpolate_pos_encoding=True)
        baseline: Baseline = ImageDownsampling((6, 6))
    else:
        whole = tower(stock, sample["pixel_values"]).transpose(1, 2).unflatten(2, (12, 12))
        features = F.avg_pool2d(whole, 2).flatten(2).transpose(1, 2)
        baseline = FeaturePooling((6, 6))
    naive = Naive(stock, shorter(sample, 36), stock.model.multi_modal_projector(features)[0])
    naive.positions = coarse_positions(sample, 6, 6)
    naive.run(range(8))
    with baseline.applied(model):
        logits = model(**sample).logits[0, -1]
    assert (logits - naive.logits()).abs().max() < 1e-4


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda each: each.name)
def test_batch_equals_one_by_one_also_with_a_cache(make_pair: Any, baseline: Baseline) -> None:
    _, model = make_pair()
    assert_batch_equals_one_by_one(model, baseline)


@torch.no_grad()
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda each: each.name)
def test_layers_see_as_many_tokens_as_are_paid_for(make_pair: Any, baseline: Fitted) -> None:
    _, model = make_pair()
    sample = prompt(2, 3, 5, seed=1)
    seen = []
    hook = model.text_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with baseline.applied(model):
        model(**sample)
    hook.remove()
    assert seen == [baseline.layer_tokens(model.text_model.shape, Prompt(((12, 12),) * 2, 9))[0] + 9]
    assert seen[0] < 2 * VISUAL * 0.5


@torch.no_grad()
@pytest.mark.parametrize("baseline", [*BASELINES, StaticPyramid("fastv", 0.3)], ids=lambda each: each.name)
def test_the_model_is_afterwards_what_it_was(make_pair: Any, baseline: Baseline) -> None:
    _, model = make_pair()
    sample = prompt(1, 3, 5, seed=0)
    before = model(**sample).logits
    with pytest.raises(KeyError), baseline.applied(model):
        raise KeyError
    assert torch.equal(model(**sample).logits, before)


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.5, 0.36])
@pytest.mark.parametrize("baseline", [ImageDownsampling(), FeaturePooling()], ids=lambda each: each.name)
def test_fit_spends_the_budget(baseline: Fitted, budget: float) -> None:
    prompts = [Prompt(((12, 12),) * images, text) for images, text in ((1, 9), (1, 40), (2, 9))]
    fitted = baseline.fit(SHAPE, prompts, budget)
    assert fitted.mean_fraction(SHAPE, prompts) == pytest.approx(budget, abs=0.04)


def test_towers_that_cannot_are_refused(make_pair: Any) -> None:
    _, model = make_pair()
    model.config.vision_config.model_type = "siglip_vision_model"
    for baseline in BASELINES:
        with pytest.raises(UsageError, match="CLIP"), baseline.applied(model):
            pass


@pytest.mark.parametrize("baseline", [ImageDownsampling(), FeaturePooling()], ids=lambda each: each.name)
def test_tiles_are_refused(make_pair: Any, baseline: Fitted) -> None:
    _, model = make_pair()
    prompts = [Prompt(((6, 6), (8, 12), (8, 1)), 9)]
    with pytest.raises(ValueError, match=f"{baseline.name} needs images that are not cut into tiles"):
        baseline.fit(model.text_model.shape, prompts, 0.5)
