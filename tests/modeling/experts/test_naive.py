"""Selections against loops over the tokens, written down from their papers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dpn_cli.modeling.experts.attention import instruction_attention
from dpn_cli.modeling.experts.blocks import SURPLUS
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.experts.registry import ASSIGNMENTS
from dpn_cli.pyramid.experts import BLOCK, Expert
from tests.modeling.experts.states import reducible, state_of, tiny_text_model

SIZE = 6
grids = st.tuples(st.integers(2, 20), st.integers(2, 20))
shares = st.sampled_from([0.1, 0.25, 0.5, 0.8])


def picture(grid: tuple[int, int], seed: int, expert: str, text_model: Any = None) -> tuple[Reducible, torch.Tensor]:
    """Return one sample with two text tokens at either end, and its visual features of length 1, [H·W, D]."""
    generator = torch.Generator().manual_seed(seed)
    height, width = grid
    cells = [[0, row, column] for row in range(height) for column in range(width)]
    coords = torch.tensor([[-1] * 3] * 2 + cells + [[-1] * 3] * 2)[None]
    size = SIZE if text_model is None else text_model.config.hidden_size
    hidden = torch.randn(1, coords.shape[1], size, generator=generator)
    batch = reducible(state_of(hidden, coords, ((grid,),)), [Expert.parse(expert)], text_model)
    return batch, F.normalize(hidden[0, 2:-2], dim=-1)


def kept(batch: Reducible) -> set[int]:
    """Return which visual tokens stay, counted from 0."""
    target = ASSIGNMENTS[batch.experts[0].kind](batch).target[0]
    stays = (target == torch.arange(len(target))).nonzero()[:, 0]
    return {int(i) - 2 for i in stays if 2 <= i < len(target) - 2}


def steps(value: float) -> float:
    """Round a cosine as the experts do."""
    return round(value * 4096) / 4096


def blocks_of(grid: tuple[int, int]) -> list[list[int]]:
    height, width = grid
    down, across = (min(BLOCK, math.ceil(side / 2)) for side in grid)
    found: dict[tuple[int, int], list[int]] = {}
    for i in range(height * width):
        found.setdefault((i // width // down, i % width // across), []).append(i)
    return list(found.values())


def most(batch: Reducible, share: float, grid: tuple[int, int]) -> int:
    """Return the tokens that are ranked in a block at most."""
    size = math.prod(min(BLOCK, math.ceil(side / 2)) for side in grid)
    total = grid[0] * grid[1]
    return min(size, math.ceil(SURPLUS * batch.experts[0].selected([grid]) / total * size))


def best(scores: dict[int, float], count: int, total: int) -> set[int]:
    order = sorted(range(total), key=lambda i: (-scores.get(i, -1.0), i))
    return set(order[:count])


@settings(max_examples=25, deadline=None)
@given(grids, shares, st.integers(0, 999))
def test_diverse_is_the_farthest_first_choice_inside_blocks(grid: tuple[int, int], share: float, seed: int) -> None:
    batch, features = picture(grid, seed, f"diverse:{share}")
    mean = F.normalize(features.sum(0), dim=0)
    scores: dict[int, float] = {}
    for block in blocks_of(grid):
        nearest = {i: 1 - steps(float(features[i] @ mean)) for i in block}
        for _ in range(min(most(batch, share, grid), len(block))):
            token, _ = max(sorted(nearest.items()), key=lambda each: each[1])
            scores[token] = nearest.pop(token)
            to_token = {i: 1 - steps(float(features[i] @ features[token])) for i in nearest}
            nearest = {i: min(distance, to_token[i]) for i, distance in nearest.items()}
    total = grid[0] * grid[1]
    assert kept(batch) == best(scores, batch.experts[0].selected([grid]), total)


@settings(max_examples=25, deadline=None)
@given(grids, shares, st.integers(0, 999))
def test_covering_is_the_greedy_facility_location_inside_blocks(grid: tuple[int, int], share: float, seed: int) -> None:
    batch, features = picture(grid, seed, f"covering:{share}")
    scores: dict[int, float] = {}
    for block in blocks_of(grid):
        alike = {(i, j): steps(float(features[i] @ features[j])) for i in block for j in block}
        covered, free = dict.fromkeys(block, -1.0), sorted(block)
        for _ in range(min(most(batch, share, grid), len(block))):
            gains = {i: sum(max(alike[i, j] - covered[j], 0) for j in block) for i in free}
            token = max(free, key=lambda i: gains[i])
            scores[token] = gains[token]
            free.remove(token)
            covered = {j: max(covered[j], alike[token, j]) for j in block}
    total = grid[0] * grid[1]
    assert kept(batch) == best(scores, batch.experts[0].selected([grid]), total)


@settings(max_examples=25, deadline=None)
@given(grids, st.integers(0, 999))
def test_pick_leaves_of_every_cell_what_is_least_like_the_mean(grid: tuple[int, int], seed: int) -> None:
    batch, features = picture(grid, seed, "pick:2x3")
    mean = F.normalize(features.sum(0), dim=0)
    cells: dict[tuple[int, int], list[int]] = {}
    for i in range(grid[0] * grid[1]):
        cells.setdefault((i // grid[1] // 2, i % grid[1] // 3), []).append(i)
    odd = {i: 1 - steps(float(features[i] @ mean)) for i in range(len(features))}
    assert kept(batch) == {max(cell, key=lambda i: odd[i]) for cell in cells.values()}


@settings(max_examples=25, deadline=None)
@given(grids, st.sampled_from([0.1, 0.4]), st.integers(0, 999))
def test_the_rest_goes_into_the_least_attended_token_of_its_cell(
    grid: tuple[int, int], share: float, seed: int
) -> None:
    batch, _ = picture(grid, seed, f"attended:{share}+4x4", tiny_text_model())
    with torch.no_grad():
        scores = instruction_attention(batch.text_model, batch.state, 1)[0, 2:-2].tolist()
        target = (ASSIGNMENTS["attended"](batch).target[0, 2:-2] - 2).tolist()
    cells: dict[tuple[int, int], list[int]] = {}
    for i in range(grid[0] * grid[1]):
        cells.setdefault((i // grid[1] // 4, i % grid[1] // 4), []).append(i)
    anchors = {min(cell, key=lambda i: scores[i]): cell for cell in cells.values()}
    others = sorted((i for i in range(len(scores)) if i not in anchors), key=lambda i: -scores[i])
    stays = set(others[: batch.experts[0].selected([grid])])
    expected = {i: i if i in stays else anchor for anchor, cell in anchors.items() for i in cell}
    assert target == [expected[i] for i in range(len(target))]


def test_blocks_of_several_images_are_chosen_as_in_one_image_each() -> None:
    """A block lies in one grid, and the share is of all of them together."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((6, 6), (10, 4), (6, 1))
    cells = [[g, r, c] for g, (h, w) in enumerate(sizes) for r in range(h) for c in range(w)]
    coords = torch.tensor([[-1] * 3, *cells, [-1] * 3])[None]
    hidden = torch.randn(1, coords.shape[1], SIZE, generator=generator)
    batch = reducible(state_of(hidden, coords, (sizes,)), [Expert.parse("diverse:0.5")])
    target = ASSIGNMENTS["diverse"](batch).target[0]
    assert int((target >= 0).sum()) == 2 + math.floor(0.5 * 82 + 0.5)
    per_grid = [int((target[coords[0, :, 0] == g] >= 0).sum()) for g in range(3)]
    assert all(0 < count < len(cells) for count in per_grid)


@pytest.mark.parametrize("kind", ["diverse", "divprune"])
def test_of_tokens_that_are_alike_one_stays(kind: str) -> None:
    """A plain picture with one odd patch per corner: the corners and something of the plain stay."""
    grid = (8, 8)
    batch, _ = picture(grid, 0, f"{kind}:0.1")
    hidden = torch.ones(1, 68, SIZE)
    for i, corner in enumerate((0, 7, 56, 63)):
        hidden[0, 2 + corner] = F.one_hot(torch.tensor(i), SIZE)
    state = state_of(hidden, batch.coords, ((grid,),))
    found = kept(reducible(state, [Expert.parse(f"{kind}:0.1")]))
    assert {0, 7, 56, 63} <= found and len(found) == 6
