"""Running the rows of a batch apart where their lengths differ, so that no layer works on much padding.

The routes of a batch leave its rows with very different numbers of tokens: padded to the longest, the rows that were
pooled most would gain nothing.

Shapes: B batch, S sequence, b rows of a group, k tokens of its longest row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpn_cli.modeling.state import put

PASS_COST = {"cpu": 64, "cuda": 1024}
"""Tokens whose work takes about as long as another pass through a layer, by type of device; ours.

Another pass reads the layer's weights and, on a GPU, starts its kernels again: on an H200 at the shape of a 7B model,
batches of four and eight were fastest, to within noise, from 768 tokens on.
"""


@dataclass(frozen=True)
class Group:
    """Rows that run together, their padding in front and as little of it as can be.

    Attributes:
        rows: [b, 1] their places in the batch.
        columns: [b, k] the columns of their tokens.
        valid: [b, k] bool, or None when no row is padded.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    valid: torch.Tensor | None

    @classmethod
    def of(cls, rows: Sequence[int], valid: torch.Tensor, lengths: Sequence[int]) -> "Group":
        """Group some rows of a batch whose tokens are `valid`, [B, S] bool, so many in each row."""
        index = put(list(rows), valid.device)
        columns = valid[index].int().argsort(dim=1, stable=True)  # the padding, then the tokens in their order
        own = [lengths[row] for row in rows]
        columns = columns[:, -max(own) :]
        return cls(index[:, None], columns, None if len(set(own)) == 1 else valid[index].gather(1, columns))


def split_by_length(lengths: Sequence[int], pass_cost: int) -> list[list[int]]:
    """Split rows into the groups that take the least work; ours.

    A group works on its rows times its longest length, plus `pass_cost`. Rows of neighbouring lengths go together, so
    that a dynamic programme over the sorted rows finds the best split.

    Args:
        lengths: tokens of every row.
        pass_cost: Cost of one more group, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    work, starts = [0], []  # of the first n rows: the least work, and where the last group starts then
    for stop in range(1, len(order) + 1):
        totals = [work[start] + (stop - start) * lengths[order[start]] + pass_cost for start in range(stop)]
        work.append(min(totals))
        starts.append(totals.index(work[-1]))
    groups, stop = [], len(order)
    while stop:
        groups.append(order[starts[stop - 1] : stop])
        stop = starts[stop - 1]
    return groups[::-1]
