"""Compaction against a loop over the tokens."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_cli.modeling.engine import DROPPED, Assignment, compact, keep_tokens
from dpn_cli.modeling.state import HIDDEN_IN_PART, PACKED, PyramidState

LENGTH, SIZE = 9, 3


def draw(seed: int, padding: list[int]) -> tuple[PyramidState, Assignment]:
    """Return rows with some padding, a few original tokens more than there are, and targets of all three kinds."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(padding)
    valid = torch.arange(LENGTH) >= torch.tensor(padding)[:, None]
    state = PyramidState(
        hidden_states=torch.randn(batch, LENGTH, SIZE, generator=generator),
        positions=torch.rand(batch, LENGTH, generator=generator),
        valid=valid,
        coords=torch.randint(-1, 5, (batch, LENGTH, 3), generator=generator),
        columns=torch.randint(LENGTH, (batch, LENGTH + 2), generator=generator),
    )
    target = torch.full((batch, LENGTH), DROPPED)
    for row, gap in enumerate(padding):
        stays = gap + torch.randperm(LENGTH - gap, generator=generator)[: 1 + seed % 4]
        chosen = torch.cat([stays, torch.tensor([DROPPED])])
        target[row, gap:] = chosen[torch.randint(len(chosen), (LENGTH - gap,), generator=generator)]
        target[row, stays] = stays
    return state, Assignment(target, coords=torch.randint(5, (batch, LENGTH, 3), generator=generator), merges=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9999), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.sampled_from(["avg", "max"]))
def test_equals_a_loop_over_the_tokens(seed: int, padding: list[int], mode: Any) -> None:
    state, assignment = draw(seed, padding)
    weights = None if mode == "max" else torch.rand(len(padding), LENGTH, 1)
    after = compact(state, assignment, mode, weights)
    scaled = state.hidden_states if weights is None else state.hidden_states * weights
    stays = [[t for t in range(LENGTH) if row[t] == t] for row in assignment.target.tolist()]
    longest = max(map(len, stays))
    assert (after.valid is None) == (len(set(map(len, stays))) == 1)
    for b, left in enumerate(stays):
        gap = longest - len(left)
        assert after.valid is None or after.valid[b].tolist() == [False] * gap + [True] * len(left)
        assert (after.coords[b, :gap] == -1).all()
        for column, token in enumerate(left, gap):
            members = [t for t in range(LENGTH) if assignment.target[b, t] == token]
            values = scaled[b, members]
            expected = values.mean(0) if mode == "avg" else values.amax(0)
            assert torch.allclose(after.hidden_states[b, column], expected, atol=1e-6)
            assert torch.isclose(after.positions[b, column], state.positions[b, members].mean(), atol=1e-6)
            assert torch.equal(after.coords[b, column], assignment.coords[b, token])
        for original, token in enumerate(state.columns[b].tolist()):
            into = int(assignment.target[b, token])
            before = [gap + i for i, t in enumerate(left) if t <= token]
            expected_column = gap + left.index(into) if into != DROPPED else before[-1] if before else max(gap - 1, 0)
            assert after.columns[b, original] == expected_column


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.permutations(range(4)))
def test_a_row_does_not_depend_on_its_place_in_the_batch(seed: int, order: list[int]) -> None:
    state, assignment = draw(seed, [0, 4, 1, 2])
    batch = {each.name: getattr(state, each.name) for each in fields(state)}
    shuffled = replace(state, **{k: v[order] for k, v in batch.items() if isinstance(v, torch.Tensor)})
    moved = replace(assignment, target=assignment.target[order], coords=assignment.coords[order])
    after, other = compact(state, assignment), compact(shuffled, moved)
    for name in ("hidden_states", "positions", "coords", "columns"):
        assert torch.equal(getattr(other, name), getattr(after, name)[order]), name


def test_what_stays_is_the_same_to_the_bit() -> None:
    state, _ = draw(seed=0, padding=[0, 3])
    kept = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    after = compact(state, keep_tokens(state, kept))
    is_left = state.valid & (kept | (state.coords[..., 0] < 0))
    for row in range(2):
        left = is_left[row]
        count = int(left.sum())
        for name in ("hidden_states", "positions", "coords"):
            assert torch.equal(getattr(after, name)[row][-count:], getattr(state, name)[row][left]), name


@pytest.mark.parametrize("refusal", [PACKED, HIDDEN_IN_PART])
def test_what_may_not_be_pooled_is_not_dropped_either(refusal: str) -> None:
    state, _ = draw(seed=0, padding=[0, 3])
    state = replace(state, refusal=refusal)
    with pytest.raises(ValueError, match=refusal[:30]):
        compact(state, keep_tokens(state, torch.ones(2, LENGTH, dtype=torch.bool)))
