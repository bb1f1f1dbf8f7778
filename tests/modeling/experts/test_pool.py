"""Ragged pooling against torch's own, one grid at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dpn_cli.modeling.engine import compact
from dpn_cli.modeling.experts.pool import pooled_cells
from dpn_cli.pyramid.experts import pool
from tests.modeling.experts.states import reducible, state_of

SIZE = 3
grids = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), max_size=3)
rates = st.sampled_from([(1, 1), (1, 2), (2, 2), (4, 4), (2, 3)])
samples = st.lists(st.tuples(grids, rates, st.integers(0, 4)), min_size=1, max_size=4)


def lay_out(sample_grids: list[tuple[int, int]], text: int) -> torch.Tensor:
    """Return coordinates: some text before, between and after the grids."""
    rows = [[-1, -1, -1]] * text
    for g, (height, width) in enumerate(sample_grids):
        rows += [[g, r, c] for r in range(height) for c in range(width)]
        rows += [[-1, -1, -1]] * (1 + text)
    return torch.tensor(rows or [[-1, -1, -1]])


@settings(max_examples=150, deadline=None)
@given(samples, st.sampled_from(["avg", "max"]), st.sampled_from(["ceil", "floor"]), st.integers(0, 999))
def test_equals_torch_pooling_of_every_grid(batch: list, mode: str, rounding: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [lay_out(sample_grids, text) for sample_grids, _, text in batch]
    expected = []
    values = [torch.randn(len(row), SIZE, generator=generator) for row in rows]
    for (sample_grids, rate, _), row, value in zip(batch, rows, values, strict=True):
        expected.append(pool_one_by_one(row, value, sample_grids, rate, mode, rounding))

    longest = max(map(len, rows))
    coords = torch.stack([F.pad(row, (0, 0, longest - len(row), 0), value=-1) for row in rows])
    hidden = torch.stack([F.pad(value, (0, 0, longest - len(value), 0), value=torch.nan) for value in values])
    valid = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows])
    all_grids, all_rates = [s[0] for s in batch], [s[1] for s in batch]
    experts = pool(*all_rates)
    after = [expert.left(grids, rounding) for expert, grids in zip(experts, all_grids, strict=True)]
    state = state_of(hidden, coords, tuple(map(tuple, all_grids)), valid)
    pooled = compact(state, pooled_cells(reducible(state, experts, rounding=rounding)), mode)

    for b, want in enumerate(expected):
        got = pooled.hidden_states[b, pooled.hidden_states.shape[1] - len(want) :]
        assert torch.allclose(got, want, atol=1e-5)
        assert pooled.valid is None or pooled.valid[b].sum() == len(want)
        for g, (height, width) in enumerate(after[b]):
            here = pooled.coords[b][pooled.coords[b, :, 0] == g][:, 1:]
            assert here.tolist() == [[r, c] for r in range(height) for c in range(width)], "raster order"


def pool_one_by_one(
    row: torch.Tensor, value: torch.Tensor, sample_grids: list, rate: tuple[int, int], mode: str, rounding: str
) -> torch.Tensor:
    pieces, start = [], 0
    while start < len(row):
        g = int(row[start, 0])
        if g < 0:
            pieces.append(value[start : start + 1])
            start += 1
            continue
        height, width = sample_grids[g]
        plane = value[start : start + height * width].T.view(1, SIZE, height, width)
        kernel = (rate[0], 1) if width == 1 else rate  # a column of newlines is not narrowed
        pieces.append(pool_plane(plane, kernel, mode, rounding == "ceil"))
        start += height * width
    return torch.cat(pieces)


def pool_plane(plane: torch.Tensor, rate: tuple[int, int], mode: str, ceil: bool) -> torch.Tensor:
    """Pool with torch where it can: it refuses kernels larger than the grid."""
    height, width = plane.shape[2:]
    cells = []
    for top in range(0, height if ceil else height - height % rate[0], rate[0]):
        for left in range(0, width if ceil else width - width % rate[1], rate[1]):
            cell = plane[0, :, top : top + rate[0], left : left + rate[1]].flatten(1)
            cells.append(cell.mean(1) if mode == "avg" else cell.amax(1))
    result = torch.stack(cells) if cells else plane.new_zeros(0, SIZE)
    if cells and height >= rate[0] and width >= rate[1]:
        function = F.avg_pool2d if mode == "avg" else F.max_pool2d
        extra = {"count_include_pad": False} if mode == "avg" else {}
        native = function(plane, rate, stride=rate, ceil_mode=ceil, **extra)
        assert torch.allclose(result, native[0].flatten(1).T, atol=1e-5)
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_full(dtype: torch.dtype) -> None:
    coords = lay_out([(16, 16)], text=0)[None]
    values = torch.full((1, coords.shape[1], SIZE), 0.1, dtype=dtype)
    state = state_of(values, coords, (((16, 16),),))
    pooled = compact(state, pooled_cells(reducible(state, pool((16, 16)))))
    assert torch.equal(pooled.hidden_states[0, 0], values[0, 0])
