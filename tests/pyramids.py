"""A tiny LLaVA and its pyramid, with routers that disagree from sample to sample."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

from dpn_cli.modeling.configuration import DpnLlavaConfig
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration
from dpn_cli.pyramid.config import DPE_PARTS, PyramidConfig, RouterConfig, Site
from dpn_cli.pyramid.experts import pool

RATES = ((1, 1), (1, 2), (2, 2))
POOLING = (  # overrides that make any recipe the paper's pyramid: three sites that pool, routers that score rates
    "pyramid.sites=[{after: 0.25}, {after: 0.5}, {after: 0.75}]",
    "pyramid.router.output=distortion",
    "pyramid.attention=plain",
)
IMAGE, VISUAL = 4, 144


def pyramid(**changes: Any) -> PyramidConfig:
    """Return the default pyramid for eight layers, with routers that need no calibration to differ."""
    sites = tuple(Site(layer, pool(*RATES)) for layer in (1, 3, 5))
    defaults: dict[str, Any] = {"sites": sites, "router": RouterConfig(output="logits")}
    return PyramidConfig(**{**defaults, **changes})


@pytest.fixture(scope="session")
def pair_factory(tiny_llava_factory: Callable[..., Path]) -> Callable[..., tuple[Any, Any]]:
    """Return `make(text, attn, layout, pyramid) -> (stock model, pyramid model)`, which nobody may change."""

    @cache
    def make_stock(folder: Path, attn: str) -> Any:
        return LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation=attn).eval()

    @cache
    def make(text: str, attn: str, layout: str, wanted: PyramidConfig) -> tuple[Any, Any]:
        folder = tiny_llava_factory(text=text, layout=layout)
        settings = AutoConfig.from_pretrained(folder).to_dict()
        settings.pop("model_type")
        config = DpnLlavaConfig(**settings)
        config.pyramid = wanted.to_dict()
        model, info = DpnLlavaForConditionalGeneration.from_pretrained(
            folder, config=config, attn_implementation=attn, output_loading_info=True
        )
        assert not info["unexpected_keys"]
        assert all(any(part in key for part in DPE_PARTS) for key in info["missing_keys"])
        return make_stock(folder, attn), model.eval()

    return make


@pytest.fixture
def make_pair(pair_factory: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Return `make(text, attn, **pyramid changes) -> (stock model, pyramid model)` with the same weights.

    The pyramid is the test's own; the stock model is everybody's, and nobody may change it.
    """

    def make(text: str = "llama", attn: str = "sdpa", layout: str = "hub", **changes: Any) -> tuple[Any, Any]:
        stock, model = pair_factory(text, attn, layout, pyramid(**changes))
        model = deepcopy(model)
        scramble_routers(model, seed=7)  # of the first dozen, the one whose routers disagree most
        return stock, model

    return make


def scramble_routers(model: Any, seed: int) -> None:
    """Give the routers random weights."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "routers" in name:
            torch.nn.init.normal_(parameter, std=1.0)


def prompt(num_images: int, before: int, after: int, seed: int) -> dict[str, torch.Tensor]:
    """Return one sample: `before` words, the images, `after` words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(5, 300, (before + after,), generator=generator).tolist()
    ids = [1, *words[:before], *[IMAGE] * (VISUAL * num_images), *words[before:]]
    sample = {"input_ids": torch.tensor([ids])}
    if num_images:
        sample["pixel_values"] = torch.randn(num_images, 3, 48, 48, generator=generator)
    return sample


def ragged_batch() -> list[dict[str, torch.Tensor]]:
    """Return six samples of different lengths, one without an image and one with two."""
    shapes = [(1, 3, 5), (1, 9, 2), (0, 4, 9), (2, 2, 6), (1, 1, 17), (1, 5, 5)]
    return [prompt(images, before, after, seed) for seed, (images, before, after) in enumerate(shapes)]


def collate(samples: list[dict[str, torch.Tensor]], side: str = "left") -> dict[str, torch.Tensor]:
    """Pad samples into one batch."""
    longest = max(s["input_ids"].shape[1] for s in samples)
    ids, mask = [], []
    for sample in samples:
        row = sample["input_ids"]
        gap = longest - row.shape[1]
        pad = (gap, 0) if side == "left" else (0, gap)
        ids.append(torch.nn.functional.pad(row, pad, value=3))
        mask.append(torch.nn.functional.pad(torch.ones_like(row), pad))
    batch = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}
    pixels = [s["pixel_values"] for s in samples if "pixel_values" in s]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    return batch


RAGGED_ROUTES = [(0, 0, 0), (1, 0, 1), (2, 1, 0), (0, 2, 0), (1, 1, 0), (2, 0, 1)]


def check_batch_equals_one_by_one(
    model: Any, samples: list[dict[str, torch.Tensor]], batch: dict[str, torch.Tensor], forced: bool
) -> None:
    """Let a model answer six samples one by one and as a batch, on `RAGGED_ROUTES` or as its routers choose."""
    alone, routes = [], []
    for sample, route in zip(samples, RAGGED_ROUTES, strict=True):
        model.set_route(route if forced else None)
        alone.append(generate(model, sample))
        routes += model.last_routes
    model.set_route(RAGGED_ROUTES if forced else None)
    together = generate(model, batch)
    assert model.last_routes == routes
    assert len(set(routes)) >= 3, "the samples must take different routes for this test to mean something"
    for i, (sample, one) in enumerate(zip(samples, alone, strict=True)):
        assert torch.equal(
            one.sequences[0, sample["input_ids"].shape[1] :], together.sequences[i, batch["input_ids"].shape[1] :]
        )
        for step_alone, step_together in zip(one.logits, together.logits, strict=True):
            assert (step_alone[0] - step_together[i]).abs().max() < 1e-4


def generate(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 4, **kwargs: Any) -> Any:
    """Return what the model generates, the likeliest token each time, with the logits of every token."""
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3, **kwargs}
    return model.generate(**inputs, max_new_tokens=tokens, return_dict_in_generate=True, output_logits=True, **settings)
