"""Salience is what the attention maps of the vision tower say, and is laid out as the features are."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dpn_cli.pyramid.config import Site
from dpn_cli.pyramid.experts import KEEP, Expert
from tests.pyramids import prompt
from tests.tiled import tiled_prompt

SALIENT = {"sites": (Site(-1, (KEEP, Expert("salient", 0.25))),), "static_route": (1,), "min_visual_tokens": 1}


def attention_maps(stock: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return the attention [I, heads, T, T] of the tower's layer whose output is taken."""
    found = stock.model.vision_tower(pixels, output_attentions=True).attentions[stock.config.vision_feature_layer]
    assert found is not None, "only eager attention tells"
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_and_newlines(make_tiled_pair: Callable[..., Any], family: str) -> None:
    """A projector that puts a patch's salience into its features shows where every patch goes."""
    stock, model = make_tiled_pair(family, attn="eager", **SALIENT)
    sample = tiled_prompt(model, [(30, 70), (7, 9)] if family == "llava_next" else [(30, 70)], 2, 3, seed=0)
    visual = {name: sample[name] for name in sample if name != "input_ids"}
    model.model.image_newline.zero_()
    tiles: list[torch.Tensor] = []

    def put_in(projector: Any, args: Any, features: torch.Tensor) -> torch.Tensor:
        maps = attention_maps(stock, tiles[0])
        has_class_token = family == "llava_next"
        salience = maps[:, :, 0, 1:].mean(1) if has_class_token else maps.mean((1, 2))
        return torch.cat([salience[..., None], features[..., 1:]], dim=-1)

    model.model.vision_tower.register_forward_pre_hook(lambda tower, args: tiles.append(args[0]))
    model.model.multi_modal_projector.register_forward_hook(put_in)
    embeds, coords, salience = model.model.embed(sample["input_ids"], **visual)
    is_visual = coords[..., 0] >= 0
    torch.testing.assert_close(salience[is_visual], embeds[is_visual][:, 0])
    assert not salience[~is_visual].any()


@torch.no_grad()
def test_averaged_features_have_the_mean_salience(make_pair: Callable[..., Any]) -> None:
    stock, model = make_pair(attn="eager", prepooling=2, **SALIENT)
    sample = prompt(1, 3, 5, seed=0)
    expected = attention_maps(stock, sample["pixel_values"])[:, :, 0, 1:].mean(1).view(6, 2, 6, 2).mean((1, 3))
    ids = torch.cat([sample["input_ids"][:, :4], sample["input_ids"][:, 4:40], sample["input_ids"][:, -5:]], dim=1)
    _, coords, salience = model.model.embed(ids, sample["pixel_values"])
    torch.testing.assert_close(salience[coords[..., 0] >= 0], expected.flatten())


@torch.no_grad()
def test_images_that_are_encoded_before(make_pair: Callable[..., Any]) -> None:
    stock, model = make_pair(**SALIENT)
    sample = prompt(1, 3, 5, seed=0)
    expected = model(**sample).logits
    pixels = sample.pop("pixel_values")
    encoded = model.model.get_image_features(pixels)
    assert torch.equal(model(**sample, mm_encoder_outputs={"image": encoded}).logits, expected)
    encoded = stock.model.get_image_features(pixels)
    with pytest.raises(ValueError, match="which these encoded images do not tell: encode them with"):
        model(**sample, mm_encoder_outputs={"image": encoded})


@torch.no_grad()
def test_salience_is_that_of_the_layer_that_is_asked_for(make_pair: Callable[..., Any]) -> None:
    _, model = make_pair(**SALIENT)
    sample = prompt(1, 3, 5, seed=0)
    asked = model(**sample, vision_feature_layer=-1).logits
    model.config.vision_feature_layer = -1
    assert torch.equal(model(**sample).logits, asked)


@torch.no_grad()
def test_threads_do_not_see_each_other_s_images(make_pair: Callable[..., Any]) -> None:
    _, model = make_pair(**SALIENT)
    samples = [prompt(count, 3, 5, seed=count) for count in (1, 12)] * 4
    expected = [model(**sample).logits for sample in samples[:2]]
    with ThreadPoolExecutor(4) as threads, torch.no_grad():
        found = list(threads.map(lambda sample: model(**sample).logits, samples))
    for i, logits in enumerate(found):
        assert torch.allclose(logits, expected[i % 2], atol=1e-4)
