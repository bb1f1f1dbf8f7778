"""The cost formulas against torch's own counter on a real forward."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpn_cli.pyramid.config import PyramidConfig, RouterConfig, Site
from dpn_cli.pyramid.cost import flops_fraction, router_flops, tokens_per_layer
from dpn_cli.pyramid.experts import KEEP, KINDS, Expert, pool
from dpn_cli.pyramid.shape import DecoderShape
from tests.pyramids import prompt

RATES = ((1, 1), (1, 2), (2, 2))
LLAVA_7B = DecoderShape(
    num_layers=32, hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_dim=128,
    vocab_size=32064,
)  # fmt: skip


@pytest.mark.parametrize("route", [(0, 0, 0), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_flops_equal_the_counter(make_pair: Any, text: str, route: tuple[int, ...]) -> None:
    _, model = make_pair(text, attn="eager")
    model.set_route(route)
    inputs = prompt(1, 3, 5, seed=0)
    shape = model.text_model.shape
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    names = {name.split(".", 1)[-1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    counted = names["model.language_model"] + names["lm_head"]

    tokens = tokens_per_layer(shape, model.pyramid, route, [(12, 12)], inputs["input_ids"].shape[1] - 144)
    head = 2 * shape.hidden_size * shape.vocab_size
    assert counted == sum(shape.layer_flops(n) for n in tokens) + head


def test_router_flops_equal_the_counter(make_pair: Any) -> None:
    _, model = make_pair()
    text_model = model.text_model
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        text_model.routers[0](torch.randn(1, model.pyramid.router.num_inputs, 64))
    assert counter.get_total_flops() == router_flops(text_model.shape, model.pyramid, 0)


# Blocks are charged as if of the largest, contextual tokens as if nothing was dropped.
AT_MOST = {"diverse": 0.9, "covering": 0.9, "relevant": 0.9, "visionzip": 0.8}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        pytest.param(kind, text, marks=[] if text == 3 or kind == "predicted" else pytest.mark.slow)
        for kind in KINDS
        for text in (3, 150)
        if kind != "keep"
    ],
)
def test_the_flops_of_a_choice_equal_the_counter(make_pair: Any, kind: str, text: int) -> None:
    """At two sites, and with a longer instruction than a predictor reads."""
    name = kind + {"share": ":0.5", "cells": ":1x2"}.get(KINDS[kind].settings[0], "")
    experts = (KEEP, Expert.parse(name))
    _, model = make_pair("qwen2", attn="eager", sites=(Site(-1, experts), Site(3, experts)), static_route=(1, 1))
    inputs, shape = prompt(1, 3, text, seed=0), model.text_model.shape
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # of the others the counter knows none on a CPU
        model(**inputs, logits_to_keep=1)
    counted = sum(counter.get_flop_counts()["DpnLlavaForConditionalGeneration.model.language_model"].values())
    whole = shape.num_layers * shape.layer_flops(inputs["input_ids"].shape[1])
    charged = round(flops_fraction(shape, model.pyramid, (1, 1), [(12, 12)], text + 4) * whole)
    assert AT_MOST.get(kind, 1) * charged <= counted <= charged


def pyramid(*layers: int, **changes: Any) -> PyramidConfig:
    return PyramidConfig(sites=tuple(Site(layer, pool(*RATES)) for layer in layers), static_route=(0, 0, 0), **changes)


def test_llava_7b_routes_cost_what_the_paper_says() -> None:
    """Table of the paper, by FastV's formula over the 576 visual tokens alone; ours adds the causal square."""
    fractions = {
        (4, 1, 1): 0.434, (4, 2, 2): 0.357, (4, 4, 4): 0.331, (2, 2, 2): 0.466,
    }  # fmt: skip
    rates = {1: 0, 2: 1, 4: 2}
    for reductions, paper in fractions.items():
        route = tuple(rates[r] for r in reductions)
        config = pyramid(7, 15, 23, min_visual_tokens=1)
        assert flops_fraction(LLAVA_7B, config, route, [(24, 24)], 0) == pytest.approx(paper, abs=0.006)


def test_text_only_samples_cost_the_whole() -> None:
    routed = PyramidConfig(sites=(Site(7, pool(*RATES)),), router=RouterConfig())
    assert flops_fraction(LLAVA_7B, routed, (0,), [], 60) == 1.0


def test_pooling_more_never_costs_more() -> None:
    config = pyramid(7, 15, 23)
    routes = list(config.routes_for([(24, 24)]))
    cost = {route: flops_fraction(LLAVA_7B, config, route, [(24, 24)], 60) for route in routes}
    for route in routes:
        for other in routes:
            if all(a <= b for a, b in zip(route, other, strict=True)):
                assert cost[other] <= cost[route]
