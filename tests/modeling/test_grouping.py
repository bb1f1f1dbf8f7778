"""Rows of unlike lengths run apart: the split, and that nothing but the padding is saved."""

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpn_cli.modeling import pyramid_text
from dpn_cli.modeling.grouping import Group, split_by_length
from dpn_cli.modeling.renamed import CACHE
from tests.pyramids import collate, ragged_batch

ROUTES = [(0, 0, 0), (1, 0, 1), (2, 1, 0), (0, 2, 0), (1, 1, 0), (2, 0, 1)]


def work(groups: list[list[int]], lengths: list[int], pass_cost: int) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) + pass_cost for rows in groups)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 80))
def test_no_split_of_the_sorted_rows_takes_less(lengths: list[int], pass_cost: int) -> None:
    groups = split_by_length(lengths, pass_cost)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    inner = range(1, len(order))
    splits = [[0, *cuts, len(order)] for count in range(len(order)) for cuts in combinations(inner, count)]
    best = min(work([order[a:b] for a, b in pairwise(cuts)], lengths, pass_cost) for cuts in splits)
    assert work(groups, lengths, pass_cost) == best


def test_a_group_leaves_out_the_padding_that_its_rows_share() -> None:
    valid = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    group = Group.of([1, 0], valid, valid.sum(1).tolist())
    assert group.valid is not None
    assert group.valid.tolist() == [[True, True, True], [False, True, True]]
    assert group.columns[0].tolist() == [1, 2, 3]
    assert group.columns[1, 1:].tolist() == [0, 1]
    assert Group.of([2], valid, valid.sum(1).tolist()).valid is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["persistent", "contiguous"])
def test_apart_or_together_gives_the_same(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch, side: str, positions: str
) -> None:
    _, model = make_pair(positions=positions)
    model.set_route(ROUTES)
    inputs = collate(ragged_batch(), side)
    passes: list[int] = []
    counter = model.text_model.layers[-1].register_forward_hook(lambda *_: passes.append(1))
    found = {}
    for cost in (0, 10**6):
        monkeypatch.setitem(pyramid_text.PASS_COST, "cpu", cost)
        passes.clear()
        with torch.no_grad():
            alone = model(**inputs, use_cache=False).logits
            cached = model(**inputs, use_cache=True)
        assert torch.allclose(alone, cached.logits, atol=1e-5)
        follow = torch.full((len(ROUTES), 1), 7)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(follow)], 1)
        with torch.no_grad():
            after = model(input_ids=follow, attention_mask=mask, past_key_values=cached[CACHE]).logits
        found[cost] = (cached.logits[inputs["attention_mask"].bool()], after, len(passes))
    counter.remove()
    assert found[0][2] > found[10**6][2]
    assert torch.allclose(found[0][0], found[10**6][0], atol=2e-5)
    assert torch.allclose(found[0][1], found[10**6][1], atol=2e-5)


def test_gradients_are_the_same_apart(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = make_pair(gate="probability")
    inputs = collate(ragged_batch())
    gradients = []
    for cost in (0, 10**6):
        monkeypatch.setitem(pyramid_text.PASS_COST, "cpu", cost)
        model.zero_grad()
        logits = model(**inputs).logits
        (logits * inputs["attention_mask"][..., None]).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.text_model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for apart, together in zip(*gradients, strict=True):
        assert torch.allclose(apart, together, atol=1e-5, rtol=1e-3)


def test_the_hidden_states_of_a_layer_stay_one_tensor(make_pair: Any) -> None:
    _, model = make_pair()
    model.set_route(ROUTES)
    with torch.no_grad():
        states = model(**collate(ragged_batch()), output_hidden_states=True).hidden_states
    assert len(states) == 1 + model.config.text_config.num_hidden_layers
    assert {len(state) for state in states} == {len(ROUTES)}
