"""Dropping visual tokens against a naive reference: eager attention maps of the stock model, one sample at a time."""

from typing import Any

import pytest
import torch
from dpn_cli.evaluation.baselines.dropping import Dropping
from dpn_cli.evaluation.baselines.fastv import FastV
from dpn_cli.evaluation.baselines.pyramid_drop import PyramidDrop
from dpn_cli.evaluation.baselines.random_dropping import RandomDropping

from dpn_cli.evaluation.baselines.contender import Prompt
from dpn_cli.families.text import TEXT_MODELS
from dpn_cli.pyramid.shape import DecoderShape
from tests.evaluation.naive import SHAPE, Naive, assert_batch_equals_one_by_one
from tests.pyramids import VISUAL, prompt

CONTENDERS = [RandomDropping(0.4), FastV(0.4), FastV(0.4, first_layers=1), PyramidDrop(0.6, sites=(1, 3, 5))]


@torch.no_grad()
def test_fastv_equals_ranking_by_the_attention_map(make_pair: Any) -> None:
    stock, model = make_pair(attn="eager")
    sample = prompt(1, 3, 5, seed=0)
    naive = Naive(stock, sample)
    attention = naive.run(range(2))
    naive.keep(attention.mean(0)[-1], 58)
    naive.run(range(2, 8))
    contender = FastV(58 / VISUAL)
    with contender.applied(model):
        logits = model(**sample).logits[0, -1]
    assert (logits - naive.logits()).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_pyramid_drop_equals_ranking_by_the_attention_maps(make_pair: Any, text: str) -> None:
    stock, model = make_pair(text, attn="eager")
    sample = prompt(2, 3, 5, seed=0)
    naive = Naive(stock, sample)
    start = 0
    for site, layer in enumerate((1, 3, 5)):
        naive.run(range(start, layer + 1))
        before = naive.hidden
        attention = naive.run(range(layer + 1, layer + 2))
        naive.hidden, start = before, layer + 1
        naive.keep(attention.mean(0)[-1], round(2 * VISUAL * 0.5 ** (site + 1)))
    naive.run(range(start, 8))
    with PyramidDrop(0.5, sites=(1, 3, 5)).applied(model):
        logits = model(**sample).logits[0, -1]
    assert (logits - naive.logits()).abs().max() < 1e-4


@torch.no_grad()
def test_random_dropping_equals_a_shorter_prompt(make_pair: Any) -> None:
    stock, model = make_pair(attn="eager")
    sample = prompt(1, 3, 5, seed=0)
    contender = RandomDropping(0.25)
    drawn = []

    class Spy(RandomDropping):
        def scores(self, *args: Any) -> torch.Tensor:
            drawn.append(super().scores(*args))
            return drawn[-1]

    with Spy(0.25).applied(model):
        logits = model(**sample).logits[0, -1]
    naive = Naive(stock, sample)
    naive.keep(drawn[0][0], contender.kept(VISUAL, 0))
    naive.run(range(8))
    assert naive.hidden.shape[1] == 1 + 8 + 36
    assert (logits - naive.logits()).abs().max() < 1e-4


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: f"{c.name}-{len(c.after_layers)}")
def test_batch_equals_one_by_one_also_with_a_cache(make_pair: Any, contender: Dropping) -> None:
    _, model = make_pair()
    assert_batch_equals_one_by_one(model, contender)


@torch.no_grad()
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: f"{c.name}-{len(c.after_layers)}")
def test_layers_see_as_many_tokens_as_are_paid_for(make_pair: Any, contender: Dropping) -> None:
    _, model = make_pair()
    sample = prompt(2, 3, 5, seed=1)
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for layer in model.text_model.layers
    ]
    with contender.applied(model):
        model(**sample)
    for hook in hooks:
        hook.remove()
    expected = contender.layer_tokens(model.text_model.shape, Prompt(((12, 12), (12, 12)), 9))
    assert seen == [count + 9 for count in expected]
    assert expected[-1] < expected[0] or contender.after_layers == (-1,)


@torch.no_grad()
def test_the_model_is_afterwards_what_it_was(make_pair: Any) -> None:
    _, model = make_pair()
    sample = prompt(1, 3, 5, seed=0)
    before = model(**sample).logits
    with pytest.raises(KeyError), FastV(0.3).applied(model):
        raise KeyError
    assert torch.equal(model(**sample).logits, before)


@torch.no_grad()
def test_dropped_tokens_follow_the_answers_not(make_pair: Any) -> None:
    """Which tokens stay depends on the instruction alone, so that teacher forcing measures what generation does."""
    _, model = make_pair()
    question, answer = prompt(1, 3, 5, seed=0), torch.tensor([[20, 21, 22]])
    ids = torch.cat([question["input_ids"], answer], 1)
    instruction = torch.tensor([question["input_ids"].shape[1] - 1])
    for contender in CONTENDERS:
        with contender.applied(model):
            alone = model(**question).logits[0, -1]
            forced = model(input_ids=ids, pixel_values=question["pixel_values"], instruction=instruction).logits
        assert (forced[0, -4] - alone).abs().max() < 1e-4, contender


@pytest.mark.parametrize("budget", [0.8, 0.5, 0.36])
@pytest.mark.parametrize("contender", [RandomDropping(), FastV(), PyramidDrop(sites=(1, 3, 5))], ids=lambda c: c.name)
def test_fit_spends_the_budget(contender: Dropping, budget: float) -> None:
    prompts = [Prompt(((12, 12),), text) for text in (8, 20, 31)] + [Prompt(((12, 12),) * 2, 9)] + [Prompt((), 40)]
    fitted = contender.fit(SHAPE, prompts, budget)
    assert fitted.mean_fraction(SHAPE, prompts[:-1]) == pytest.approx(budget, abs=0.006)


def test_fit_says_what_is_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"fastv cannot spend less than 0\.283"):
        FastV().fit(SHAPE, [Prompt(((12, 12),), 9)], 0.1)


def test_fastv_is_tried_with_every_depth_that_can_spend_so_little() -> None:
    prompts = [Prompt(((12, 12),), 9)]
    depths = {
        budget: [each.first_layers for each in FastV().candidates(SHAPE, prompts, budget)] for budget in (0.8, 0.5)
    }
    assert depths == {0.8: [2, 3, 5], 0.5: [2, 3]}
    with pytest.raises(ValueError, match=r"fastv cannot spend less than 0\.283"):
        FastV().candidates(SHAPE, prompts, 0.2)


def test_fit_on_the_original_shape_matches_fastv_at_half() -> None:
    """FastV's headline: K = 2 and half of the tokens is about 55% of LLaVA-1.5-7B's FLOPs."""
    shape = DecoderShape(32, 4096, 11008, 32, 32, 128, 32064)
    half = FastV(0.5).mean_fraction(shape, [Prompt(((24, 24),), 64)])
    assert half == pytest.approx(0.56, abs=0.02)
    assert FastV().fit(shape, [Prompt(((24, 24),), 64)], half).keep == pytest.approx(0.5, abs=0.002)
