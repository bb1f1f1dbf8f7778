"""The presets of the literature against naive references: the stock model, one sample and one token at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dpn_cli.evaluation.baselines.baseline import Prompt
from dpn_cli.evaluation.baselines.static import StaticPyramid
from dpn_cli.evaluation.latency import prompts_of
from dpn_cli.families.text import TEXT_MODELS
from dpn_cli.pyramid.presets import PRESETS
from dpn_cli.pyramid.shape import DecoderShape
from tests.evaluation.naive import SHAPE, Naive, assert_batch_equals_one_by_one
from tests.pyramids import VISUAL, collate, prompt, ragged_batch
from tests.tiled import collate_tiled, tiled_prompt

GRID = (12, 12)
EVERY = [StaticPyramid(name, 0.4) for name in PRESETS] + [StaticPyramid("fastv", 0.4, first_layers=3)]
every_preset = pytest.mark.parametrize("baseline", EVERY, ids=lambda each: each.label)


def logits(model: Any, baseline: StaticPyramid, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what a model gives as the next token."""
    with torch.no_grad(), baseline.applied(model):
        found: torch.Tensor = model(**sample).logits[0, -1]
    return found


def kept(model: Any, baseline: StaticPyramid, batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Return which visual tokens every sample keeps at the first site, counted from its first one."""
    found: list[list[int]] = []

    def watch(state: Any, site: int) -> Any:
        reduced = model.text_model.reduce(state, site)
        if site == 0:
            for before, after, old, new in zip(
                state.coords, reduced.coords, state.positions, reduced.positions, strict=True
            ):
                first = old[before[:, 0] >= 0].min().item() if (before[:, 0] >= 0).any() else 0
                found.append([int(position - first) for position in new[after[:, 0] >= 0]])
        return reduced

    with torch.no_grad(), baseline.applied(model), model.reduced_by(watch):
        model(**batch)
    return found


def by_attention(naive: Naive, layer: int, share: float) -> None:
    """Keep a share of the visual tokens by what the last token attends to in a layer, which is yet to run."""
    before = naive.hidden
    weights = naive.run(range(layer, layer + 1)).mean(0)[-1]
    naive.hidden = before
    naive.keep(weights, int(share * int(naive.is_visual.sum()) + 0.5))


@pytest.mark.parametrize("first_layers", [None, 3])
def test_fastv_keeps_what_the_attention_of_the_next_layer_says(make_pair: Any, first_layers: int | None) -> None:
    stock, model = make_pair(attn="eager")
    sample, depth = prompt(1, 3, 5, seed=0), first_layers or 2
    with torch.no_grad():
        naive = Naive(stock, sample)
        naive.run(range(depth))
        by_attention(naive, depth, 0.4)
        naive.run(range(depth, 8))
    assert int(naive.is_visual.sum()) == 58
    assert (logits(model, StaticPyramid("fastv", 0.4, first_layers), sample) - naive.logits()).abs().max() < 1e-4


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_pyramiddrop_keeps_what_the_attention_says_at_every_quarter(make_pair: Any, text: str) -> None:
    stock, model = make_pair(text, attn="eager")
    sample = prompt(2, 3, 5, seed=0)
    with torch.no_grad():
        naive = Naive(stock, sample)
        for quarter in (2, 4, 6):
            naive.run(range(quarter - 2, quarter))
            by_attention(naive, quarter, 0.5)
        naive.run(range(6, 8))
    assert int(naive.is_visual.sum()) == 2 * VISUAL / 8
    assert (logits(model, StaticPyramid("pyramiddrop", 0.5), sample) - naive.logits()).abs().max() < 1e-4


def farthest_first(features: torch.Tensor, count: int) -> set[int]:
    """Choose tokens [N, D] one by one, each the least like those before, the first one the least like the mean."""
    features = torch.nn.functional.normalize(features, dim=-1)
    chosen, last = list[int](), torch.nn.functional.normalize(features.mean(0), dim=0)
    similarity = [-torch.inf] * len(features)
    while len(chosen) < count:
        similarity = [
            max(most, float((token @ last * 4096).round())) for token, most in zip(features, similarity, strict=True)
        ]
        rest = [i for i in range(len(features)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: similarity[i]))
        last = features[chosen[-1]]
    return set(chosen)


def least_like_pivots(features: torch.Tensor, count: int) -> set[int]:
    """Choose the four longest tokens [N, D], and those whose nearest of them is the farthest."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    pivots = features.norm(dim=1).argsort(descending=True)[:4].tolist()
    likeness = [max(float((token @ unit[pivot] * 4096).round()) for pivot in pivots) for token in unit]
    rest = sorted((i for i in range(len(unit)) if i not in pivots), key=lambda i: likeness[i])
    return {*pivots, *rest[: count - 4]}


def test_visionzip_keeps_what_the_class_token_attends_to_and_means_of_the_rest(make_pair: Any) -> None:
    stock, model = make_pair(attn="eager")
    sample = prompt(1, 3, 5, seed=0)
    with torch.no_grad():
        maps = stock.model.vision_tower(sample["pixel_values"], output_attentions=True).attentions
        salience = maps[stock.config.vision_feature_layer][0, :, 0, 1:].mean(0)
        naive = Naive(stock, sample)
        first = int(naive.is_visual.nonzero()[0])
        tokens = naive.hidden[0, naive.is_visual]
        unit = tokens / tokens.norm(dim=1, keepdim=True)

        dominant = salience.topk(49).indices.tolist()  # of the 58 tokens that stay
        rest = [i for i in range(VISUAL) if i not in dominant]
        members: dict[int, list[int]] = {anchor: [anchor] for anchor in rest[:: len(rest) // 9][:9]}
        for i in rest:
            if i not in members:
                nearest = max(members, key=lambda anchor: float((unit[i] @ unit[anchor] * 4096).round()))
                members[nearest].append(i)
        positions = naive.positions.float()
        for anchor, group in members.items():
            naive.hidden[0, first + anchor] = tokens[group].mean(0)
            positions[0, first + anchor] = first + sum(group) / len(group)
        naive.positions = positions
        chosen = torch.zeros(naive.hidden.shape[1])
        chosen[first + torch.tensor([*dominant, *members])] = 1
        naive.keep(chosen, 58)
        naive.run(range(8))
    assert (logits(model, StaticPyramid("visionzip", 0.4), sample) - naive.logits()).abs().max() < 1e-4


def evenly_spaced(features: torch.Tensor, count: int) -> set[int]:
    return {i for i in range(len(features)) if (i + 1) * count // len(features) > i * count // len(features)}


@pytest.mark.parametrize(
    ("name", "depth", "naive_choice"),
    [("divprune", 0, farthest_first), ("dart", 2, least_like_pivots), ("stride", 0, evenly_spaced)],
)
def test_a_choice_by_features_is_that_of_a_naive_loop(
    make_pair: Any, name: str, depth: int, naive_choice: Callable[[torch.Tensor, int], set[int]]
) -> None:
    stock, model = make_pair(attn="eager")
    sample = prompt(1, 3, 5, seed=0)
    with torch.no_grad():
        naive = Naive(stock, sample)
        if depth:
            naive.run(range(depth))
        chosen = naive_choice(naive.hidden[0, naive.is_visual], 58)
        scores = torch.zeros(naive.hidden.shape[1])
        scores[naive.is_visual.nonzero()[:, 0][list(chosen)]] = 1
        naive.keep(scores, 58)
        naive.run(range(depth, 8))
    assert kept(model, StaticPyramid(name, 0.4), sample) == [sorted(chosen)]
    assert (logits(model, StaticPyramid(name, 0.4), sample) - naive.logits()).abs().max() < 1e-4


def test_random_tokens_are_the_same_in_any_batch_and_others_for_other_sizes(make_pair: Any) -> None:
    _, model = make_pair()
    samples, baseline = ragged_batch(), StaticPyramid("random", 0.25)
    together = kept(model, baseline, collate(samples))
    alone = [kept(model, baseline, sample) for sample in samples]
    assert alone == [[] if not tokens else [tokens] for tokens in together]
    assert [len(tokens) for tokens in together] == [36, 36, 0, 72, 36, 36]
    assert len({tuple(tokens) for tokens in together}) == 6
    assert together[0] != list(range(together[0][0], together[0][0] + 36))


@pytest.mark.parametrize(  # every expert batches exactly (test_every_kind.py): here, one preset of each shape
    "baseline",
    [
        pytest.param(each, marks=[] if each.name in ("pyramiddrop", "divprune", "dart") else pytest.mark.slow)
        for each in EVERY
    ],
    ids=lambda each: each.label,
)
def test_batch_equals_one_by_one_also_with_a_cache(make_pair: Any, baseline: StaticPyramid) -> None:
    _, model = make_pair()
    assert_batch_equals_one_by_one(model.double(), baseline)


@torch.no_grad()
@every_preset
def test_layers_see_as_many_tokens_as_are_paid_for(make_pair: Any, baseline: StaticPyramid) -> None:
    _, model = make_pair()
    sample, seen = prompt(2, 3, 5, seed=1), []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for layer in model.text_model.layers
    ]
    with baseline.applied(model):
        model(**sample)
    for hook in hooks:
        hook.remove()
    shape, asked = model.text_model.shape, Prompt((GRID, GRID), 9)
    expected = baseline.layer_tokens(shape, asked)
    assert seen == [count + 9 for count in expected] and expected[-1] < 2 * VISUAL
    layers = sum(shape.layer_flops(count) for count in seen) / (8 * shape.layer_flops(2 * VISUAL + 9))
    choosing = baseline.fraction(shape, asked) - layers
    assert choosing == pytest.approx(0) if baseline.name in ("random", "stride") else choosing > 1e-5


@torch.no_grad()
@every_preset
def test_dropped_tokens_follow_the_answers_not(make_pair: Any, baseline: StaticPyramid) -> None:
    """Which tokens stay depends on the instruction alone, so that teacher forcing measures what generation does."""
    _, model = make_pair()
    question, answer = prompt(1, 3, 5, seed=0), torch.tensor([[20, 21, 22]])
    ids = torch.cat([question["input_ids"], answer], 1)
    instruction = torch.tensor([question["input_ids"].shape[1] - 1])
    with baseline.applied(model):
        alone = model(**question).logits[0, -1]
        forced = model(input_ids=ids, pixel_values=question["pixel_values"], instruction=instruction).logits
    assert (forced[0, -4] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("budget", [0.8, 0.5, 0.36])
@pytest.mark.parametrize("name", PRESETS)
def test_fit_spends_the_budget(name: str, budget: float) -> None:
    prompts = [Prompt((GRID,), text) for text in (8, 20, 31)] + [Prompt((GRID,) * 2, 9), Prompt((), 40)]
    fitted = StaticPyramid(name).fit(SHAPE, prompts, budget)
    assert fitted.mean_fraction(SHAPE, prompts[:-1]) == pytest.approx(budget, abs=0.006)


def test_who_pays_more_for_choosing_keeps_fewer_tokens() -> None:
    """At equal FLOPs, all before the first layer: the choice is part of what is spent."""
    prompts = [Prompt((GRID,), 9)]
    fitted = {name: StaticPyramid(name).fit(SHAPE, prompts, 0.5) for name in ("random", "scope", "divprune")}
    tokens = [each.layer_tokens(SHAPE, prompts[0])[0] for each in fitted.values()]
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) == 3


@pytest.mark.parametrize("name", PRESETS)
def test_the_least_that_is_spent_can_be_run(make_pair: Any, name: str) -> None:
    """A share is fitted only if every image loses tokens at every site."""
    _, model = make_pair()
    prompts = [Prompt((GRID,), 9), Prompt((GRID,) * 2, 9)]
    cheapest = StaticPyramid(name).settings(SHAPE, prompts)[0]
    for number in (1, 2):
        assert logits(model, cheapest, prompt(number, 3, 5, seed=0)).isfinite().all()
    assert cheapest.share < 0.11 and cheapest.mean_fraction(SHAPE, prompts) < 0.6
    least = cheapest.mean_fraction(SHAPE, prompts)
    with pytest.raises(ValueError, match=f"{name} cannot spend less than {least:.3f}"):
        StaticPyramid(name).fit(SHAPE, prompts, least - 0.02)


def test_fastv_is_tried_with_every_depth_that_can_spend_so_little() -> None:
    prompts = [Prompt((GRID,), 9)]

    def depths(shape: DecoderShape, budget: float) -> list[int | None]:
        return [each.first_layers for each in StaticPyramid("fastv").candidates(shape, prompts, budget)]

    assert depths(SHAPE, 0.8) == [2, 3, 5] and depths(SHAPE, 0.5) == [2, 3]
    with pytest.raises(ValueError, match=r"fastv cannot spend less than 0\.288"):
        depths(SHAPE, 0.2)
    assert depths(DecoderShape(4, 64, 128, 4, 2, 16, 304), 0.8) == [2, 3], "K = 5 of 4 layers there is not"


def test_fit_on_the_original_shape_matches_fastv_at_half() -> None:
    """FastV's headline: K = 2 and half of the tokens is about 55% of LLaVA-1.5-7B's FLOPs."""
    shape, prompts = DecoderShape(32, 4096, 11008, 32, 32, 128, 32064), [Prompt(((24, 24),), 64)]
    half = StaticPyramid("fastv", 0.5).mean_fraction(shape, prompts)
    assert half == pytest.approx(0.56, abs=0.02)
    fitted = StaticPyramid("fastv").fit(shape, prompts, half)
    assert fitted.share == pytest.approx(0.5, abs=0.002)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "baseline"),
    [
        pytest.param("llava_next", each, marks=pytest.mark.slow if each.name in ("dart", "scope", "stride") else [])
        for each in EVERY
    ]
    + [
        pytest.param("llava_onevision", each, marks=[] if each.name == "pyramiddrop" else pytest.mark.slow)
        for each in EVERY
    ],
    ids=lambda each: each if isinstance(each, str) else each.label,
)
def test_tiles_of_any_size_are_fitted_and_batched_exactly(
    make_tiled_pair: Any, family: str, baseline: StaticPyramid
) -> None:
    _, model = make_tiled_pair(family)
    model.double()
    sizes = [[(30, 70)], [(90, 31)], [(40, 40), (20, 33)]]
    samples = [tiled_prompt(model, each, 3, 5 + seed, seed) for seed, each in enumerate(sizes)]
    prompts = [prompt for sample in samples for prompt in prompts_of(model, collate_tiled([sample]))]
    assert len({prompt.grids for prompt in prompts}) == 3
    shape = model.text_model.shape
    fitted = replace(baseline, share=1.0).fit(shape, prompts, 0.6)
    assert fitted.mean_fraction(shape, prompts) == pytest.approx(0.6, abs=0.02)
    with fitted.applied(model):
        together = model(**collate_tiled(samples)).logits[:, -1]
        alone = [model(**sample).logits[0, -1] for sample in samples]
    assert (together - torch.stack(alone)).abs().max() < 1e-3, "positions are in float32"
