"""Every kind of expert by its name, and a batch whose samples take experts of several kinds.

Shapes: B batch, S sequence.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpn_cli.modeling.engine import Assignment
from dpn_cli.modeling.experts.attended import attended_tokens
from dpn_cli.modeling.experts.controls import every_token, no_token, random_tokens, spaced_tokens
from dpn_cli.modeling.experts.covering import covering_tokens
from dpn_cli.modeling.experts.distinct import distinct_tokens
from dpn_cli.modeling.experts.diverse import diverse_everywhere, diverse_tokens
from dpn_cli.modeling.experts.pick import picked_tokens
from dpn_cli.modeling.experts.pool import pooled_cells
from dpn_cli.modeling.experts.predicted import predicted_tokens
from dpn_cli.modeling.experts.reducible import Reducible
from dpn_cli.modeling.experts.relevant import relevant_tokens
from dpn_cli.modeling.experts.salient import salient_and_contextual, salient_tokens
from dpn_cli.modeling.state import PyramidState, put
from dpn_cli.pyramid.experts import Expert

ASSIGNMENTS: dict[str, Callable[[Reducible], Assignment]] = {
    "keep": every_token,
    "pool": pooled_cells,
    "pick": picked_tokens,
    "diverse": diverse_tokens,
    "attended": attended_tokens,
    "predicted": predicted_tokens,
    "guided": predicted_tokens,
    "exit": no_token,
    "divprune": diverse_everywhere,
    "relevant": relevant_tokens,
    "salient": salient_tokens,
    "visionzip": salient_and_contextual,
    "covering": covering_tokens,
    "distinct": distinct_tokens,
    "random": random_tokens,
    "stride": spaced_tokens,
}
"""What the kinds of `dpn_cli.pyramid.experts` do."""


def assign(text_model: Any, state: PyramidState, experts: Sequence[Expert], next_layer: int) -> Assignment:
    """Say which token goes where in a batch, kind by kind.

    Args:
        text_model: the decoder.
        state: a batch with visual tokens; a sample without any is given `keep`.
        experts: one per sample.
        next_layer: the index of the layer after the site.
    """
    kinds = dict.fromkeys(expert.kind for expert in experts)
    if len(kinds) == 1:
        return ASSIGNMENTS[experts[0].kind](Reducible(state, experts, text_model, next_layer))
    assert state.coords is not None
    target = torch.empty(state.coords.shape[:2], dtype=torch.long, device=state.coords.device)
    coords, lengths, merges = state.coords.clone(), [0] * len(experts), False
    for kind in kinds:
        rows = [row for row, expert in enumerate(experts) if expert.kind == kind]
        index = put(rows, target.device)
        part = ASSIGNMENTS[kind](Reducible(state.rows(rows), [experts[r] for r in rows], text_model, next_layer))
        target[index] = part.target
        merges |= part.merges
        if part.coords is not None:
            coords[index] = part.coords
        for row, length in zip(rows, part.lengths or (), strict=True):
            lengths[row] = length
    return Assignment(target, coords, lengths, merges)
