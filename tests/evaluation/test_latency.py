"""Timing with a clock that counts, costs against the formulas, and the interval of a median by simulation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpn_cli.evaluation.baselines.baseline import Prompt
from dpn_cli.evaluation.baselines.routes import FixedRoute, Original, Routed
from dpn_cli.evaluation.latency import measure_latency, median_interval, prompts_of, synthetic_inputs
from dpn_cli.evaluation.timing import attention_kernels, time_generation
from dpn_cli.pyramid.cost import tokens_per_layer
from tests.pyramids import IMAGE, VISUAL, collate, prompt, ragged_batch

ROUTE = (2, 0, 1)


def ticks() -> Callable[[], float]:
    """Return a clock that moves on by one second whenever it is read."""
    counter = count()
    return lambda: float(next(counter))


def words_only() -> dict[str, torch.Tensor]:
    return collate([prompt(0, 3, 5, seed=0)])


def test_phases_lie_between_the_reads_of_the_clock(make_pair: Any) -> None:
    _, model = make_pair()
    timing, _ = time_generation(model, collate([prompt(1, 3, 5, seed=0)]), 4, ticks())
    # 0 start, 1 tower, 2 behind the projector, 3 to 6 the tokens
    assert (timing.vision_s, timing.prefill_s, timing.first_token_s, timing.decode_s) == (1.0, 2.0, 3.0, 1.0)
    timing, _ = time_generation(model, words_only(), 1, ticks())
    assert (timing.vision_s, timing.prefill_s, timing.decode_s) == (0.0, 1.0, None)


def test_the_cache_is_that_of_the_route_and_of_all_new_tokens(make_pair: Any) -> None:
    _, model = make_pair()
    model.set_route(ROUTE)
    model.generation_config.eos_token_id = list(range(304))  # whatever comes would end the answer
    inputs = collate([prompt(1, 3, 5, seed=0)])
    timing, logits = time_generation(model, inputs, 4)
    shape = model.text_model.shape
    tokens = tokens_per_layer(shape, model.pyramid, ROUTE, [(12, 12)], inputs["input_ids"].shape[1] - VISUAL)
    assert timing.kv_bytes == sum(shape.kv_bytes(n + 3, bytes_per_value=4) for n in tokens)
    with torch.no_grad():
        assert torch.allclose(logits, model(**inputs).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize(("attn", "expected"), [("sdpa", True), ("eager", False)])
def test_kernels_of_the_language_model(make_pair: Any, attn: str, expected: bool) -> None:
    _, model = make_pair(attn=attn)
    with attention_kernels(model) as kernels, torch.no_grad():
        model(**words_only())
    assert any("flash" in name for name in kernels) == expected
    before = set(kernels)
    with torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 1, 4, 8))
    assert kernels == before


class Late(Original):
    """The original, with a language model that lets the clock run on, by one second more in every prefill."""

    def __init__(self, clock: "Clock") -> None:
        object.__setattr__(self, "clock", clock)

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        self.clock.calls.append("late")
        hook = model.text_model.register_forward_pre_hook(lambda *_: self.clock.skip())
        with super().applied(model):
            yield
        hook.remove()


class Clock:
    """Reads as it is told; a prefill of the original takes one second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def skip(self) -> None:
        self.now += 1.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_speed_ups_are_medians_of_paired_ratios(make_pair: Any) -> None:
    _, model = make_pair()
    clock = Clock()
    result = measure_latency(
        model, {"late": Late(clock), Original.name: Original()}, [words_only()] * 3, new_tokens=1, clock=clock
    )
    assert [each.name for each in result.measurements] == [Original.name, "late"]
    original, late = (each.phases["prefill"] for each in result.measurements)
    assert (original.median_s, original.speedup, original.speedup_high) == (1.0, 1.0, 1.0)
    assert (late.median_s, late.speedup) == (2.0, 0.5)
    assert "decode" not in result.measurements[0].phases
    assert "vision" not in result.measurements[0].phases
    assert len(clock.calls) == 4  # a warm-up and three rounds


def test_costs_and_fidelity_of_a_ragged_batch(make_pair: Any) -> None:
    _, model = make_pair()
    inputs, advanced = collate(ragged_batch()), []
    fixed = FixedRoute(model.pyramid, ROUTE)
    methods = {Original.name: Original(), "fixed": fixed, "dpn": Routed()}
    result = measure_latency(model, methods, [inputs] * 2, new_tokens=2, advance=advanced.append)
    assert sum(advanced) == 3 * (1 + 2)
    original, cheap, _ = result.measurements
    assert (original.fraction, original.distortion, original.agreement) == (1.0, 0.0, 1.0)

    shape, prompts = model.text_model.shape, prompts_of(model, inputs)
    full = [shape.num_layers * shape.layer_flops(p.visual_tokens + p.text_tokens) for p in prompts]
    spent = [fraction * flops for fraction, flops in zip(fixed.fractions(model, prompts), full, strict=True)]
    assert cheap.flops == pytest.approx(sum(spent))
    assert cheap.fraction == pytest.approx(sum(spent) / sum(full))
    assert cheap.ideal_speedup > 1
    with torch.no_grad(), Original().applied(model):
        theirs = model(**inputs).logits[:, -1].log_softmax(-1)
    with torch.no_grad(), fixed.applied(model):
        mine = model(**inputs).logits[:, -1].log_softmax(-1)
    assert cheap.distortion == pytest.approx((theirs.exp() * (theirs - mine)).sum(-1).mean().item(), rel=1e-3)
    assert result.to_dict()["measurements"][1]["ideal_speedup"] == cheap.ideal_speedup


def test_prompts_are_told_from_a_batch(make_pair: Any) -> None:
    _, model = make_pair()
    grid = ((12, 12),)
    expected = [Prompt(grid * images, text) for images, text in ((1, 9), (1, 12), (0, 14), (2, 9), (1, 19), (1, 11))]
    assert prompts_of(model, collate(ragged_batch())) == expected
    assert prompts_of(model, words_only()) == [Prompt((), 9)]


@pytest.mark.parametrize("images", [0, 1, 2])
def test_synthetic_prompts_have_the_lengths_that_were_asked_for(make_pair: Any, images: int) -> None:
    _, model = make_pair()
    encoded = {"input_ids": torch.full((1, 1 + images * VISUAL), IMAGE)}
    encoded["input_ids"][0, 0] = 1
    if images:
        encoded["pixel_values"] = torch.randn(images, 3, 48, 48)
    batch = synthetic_inputs(model, encoded, (7, 2, 12))
    assert prompts_of(model, batch) == [Prompt(((12, 12),) * images, text) for text in (7, 2, 12)]
    with torch.no_grad():
        assert model(**batch, logits_to_keep=1).logits.isfinite().all()


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40))
def test_an_interval_lies_around_its_median_and_is_all_there_is_of_few_values(values: list[float]) -> None:
    low, high = median_interval(values)
    assert low <= np.median(values) <= high
    if len(values) < 6:
        assert (low, high) == (min(values), max(values))


@pytest.mark.parametrize("size", [6, 9, 20])
def test_the_interval_covers_the_median_as_often_as_it_says_and_a_narrower_one_does_not(size: int) -> None:
    draws = np.sort(np.random.default_rng(0).lognormal(size=(20_000, size)), axis=1)
    low, high = median_interval(range(size))
    covered = (draws[:, low] <= 1) & (draws[:, high] >= 1)
    narrower = (draws[:, low + 1] <= 1) & (draws[:, high - 1] >= 1)
    assert covered.mean() >= 0.945
    assert narrower.mean() < 0.95
