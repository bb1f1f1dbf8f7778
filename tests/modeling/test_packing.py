"""Rows of unlike lengths run as one row: the groups of their attention, and that nothing but padding is saved."""

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpn_cli.modeling import packing
from dpn_cli.modeling.packing import Packing, rounded, split_by_length
from dpn_cli.modeling.renamed import CACHE
from tests.pyramids import RAGGED_ROUTES, collate, prompt, ragged_batch


def work(groups: list[list[int]], lengths: list[int], call_cost: int) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) ** 2 + call_cost**2 for rows in groups)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 80))
def test_no_split_of_the_sorted_rows_takes_less(lengths: list[int], call_cost: int) -> None:
    groups = split_by_length(lengths, call_cost)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    inner = range(1, len(order))
    splits = [[0, *cuts, len(order)] for count in range(len(order)) for cuts in combinations(inner, count)]
    best = min(work([order[a:b] for a, b in pairwise(cuts)], lengths, call_cost) for cuts in splits)
    assert work(groups, lengths, call_cost) == best


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 9))
def test_rows_are_laid_out_as_they_were(lengths: list[int], surplus: int, call_cost: int) -> None:
    length = max(lengths) + surplus
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packing.CALL_COST, "cpu", call_cost)
        packed = Packing.of(lengths, length, torch.device("cpu"))
    batch = torch.arange(len(lengths) * length).view(len(lengths), length)
    valid = torch.arange(length) >= length - torch.tensor(lengths)[:, None]
    row = packed.pack(batch)
    assert sorted(row[0, : sum(lengths)].tolist()) == batch[valid].tolist()
    assert torch.equal(packed.lay_out(row)[valid], batch[valid])
    for group in packed.groups:
        own, shown = group.of_batch(batch), group.of_batch(valid)
        apart = group.lay_out(row[:, None, :, None])  # of one head, of size 1
        assert torch.equal(apart[:, 0, :, 0][shown], own[shown])
        assert torch.equal(group.pack(apart)[:, 0, 0], row[0, group.span])


def test_packed_rows_have_few_lengths() -> None:
    counts = range(1, 1 << 14)
    assert all(count <= rounded(count) <= count * 33 / 32 for count in counts)
    assert len({rounded(count) for count in counts}) <= 32 * 10


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `packs(call_cost)`, with which attention takes more or fewer groups, or with None nothing is packed."""

    def set_cost(cost: int | None) -> None:
        monkeypatch.setitem(packing.CALL_COST, "cpu", cost or 0)
        monkeypatch.setitem(packing.MOVE_COST, "cpu", 10**6 if cost is None else 0)

    return set_cost


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [{}, {"positions": "contiguous"}, {"attention": "sized"}], ids=str)
def test_packed_or_padded_gives_the_same(make_pair: Any, packs: Any, side: str, settings: dict[str, str]) -> None:
    _, model = make_pair(**settings)
    model.set_route(RAGGED_ROUTES)
    inputs = collate(ragged_batch(), side)
    rows: list[int] = []
    counter = model.text_model.layers[-1].mlp.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    found = {}
    for cost in (None, 0, 10**6):
        packs(cost)
        rows.clear()
        with torch.no_grad():
            alone = model(**inputs, use_cache=False).logits
            cached = model(**inputs, use_cache=True)
        shown = inputs["attention_mask"].bool()
        assert torch.allclose(alone[shown], cached.logits[shown], atol=1e-5)
        follow = torch.full((len(RAGGED_ROUTES), 1), 7)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(follow)], 1)
        with torch.no_grad():
            after = model(input_ids=follow, attention_mask=mask, past_key_values=cached[CACHE]).logits
        assert rows == ([len(RAGGED_ROUTES)] * 3 if cost is None else [1, 1, len(RAGGED_ROUTES)])
        found[cost] = (cached.logits[shown], after)
    counter.remove()
    for cost in (0, 10**6):
        for packed, padded in zip(found[cost], found[None], strict=True):
            assert torch.allclose(packed, padded, atol=2e-5)


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_row_that_is_hidden_altogether_takes_no_other_s_keys(make_pair: Any, packs: Any, use_cache: bool) -> None:
    """All tokens are then in one row, so that packed keys are as long as laid-out ones."""
    _, model = make_pair()
    model.set_route((1, 1, 0))
    packs(0)
    batch = collate([prompt(1, 3, 5, seed=0), prompt(1, 9, 2, seed=1)])
    batch["attention_mask"][0] = 0
    with torch.no_grad():
        logits = model(**batch, use_cache=use_cache).logits[1, -1]
        alone = model(**prompt(1, 9, 2, seed=1)).logits[0, -1]
    assert torch.allclose(logits, alone, atol=2e-5)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=5).filter(any), st.integers(0, 30))
def test_laid_out_keys_give_what_packed_ones_give(lengths: list[int], call_cost: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packing.CALL_COST, "cpu", call_cost)
        packed = Packing.of(lengths, sum(lengths), torch.device("cpu"))
    length = sum(lengths)
    valid = torch.arange(length) >= length - torch.tensor(lengths)[:, None]
    mask = packed.mask(lambda group: group.of_batch(valid)[:, None, None])
    states = torch.randn(3, 1, 2, len(packed.places), 4)
    query, key, value = states
    laid_out = (packed.lay_out_heads(each) for each in (key, value))
    attention = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(attention(query, key, value, attn_mask=mask), attention(query, *laid_out, attn_mask=mask))


def test_a_mask_goes_to_a_device_and_takes_no_dtype() -> None:
    mask = Packing.of([1, 2], 2, torch.device("cpu")).mask(lambda group: None)
    assert mask.to(torch.bfloat16).packing.places.dtype == torch.long
    assert mask.to("meta", non_blocking=True).packing.groups[0].tokens.is_meta  # type: ignore[union-attr]


def test_gradients_are_the_same_packed(make_pair: Any, packs: Any) -> None:
    _, model = make_pair(gate="probability")
    inputs = collate(ragged_batch())
    gradients = []
    for cost in (None, 0, 10**6):
        packs(cost)
        model.zero_grad()
        logits = model(**inputs).logits
        (logits * inputs["attention_mask"][..., None]).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.text_model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == len(gradients[2]) > 0
    for padded, *packed in zip(*gradients, strict=True):
        for each in packed:
            assert torch.allclose(each, padded, atol=1e-5, rtol=1e-3)


def test_the_hidden_states_of_a_layer_stay_one_tensor(make_pair: Any) -> None:
    _, model = make_pair()
    model.set_route(RAGGED_ROUTES)
    with torch.no_grad():
        states = model(**collate(ragged_batch()), output_hidden_states=True).hidden_states
    assert len(states) == 1 + model.config.text_config.num_hidden_layers
    assert {len(state) for state in states} == {len(RAGGED_ROUTES)}
