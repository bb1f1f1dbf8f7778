"""No expert waits for the device: what it has to know on the host follows from the grids."""

from typing import Any

import pytest
import torch

from dpn_cli.pyramid.config import RouterConfig, Site
from dpn_cli.pyramid.experts import KEEP, Expert, examples, num_tokens
from tests.pyramids import collate, ragged_batch


@pytest.mark.parametrize("name", [text for text in examples() if text != "keep"])
def test_no_expert_reads_back_from_the_device(make_pair: Any, name: str) -> None:
    """Every tensor of the decoder is on the meta device, where reading a value back is an error."""
    if name.startswith("random"):
        pytest.skip("random numbers are drawn on the host, and go one way")
    sites = (Site(1, (KEEP, Expert.parse(name))),)
    _, model = make_pair(sites=sites, static_route=(1,), min_visual_tokens=1, router=RouterConfig())
    text_model = model.text_model
    batch = collate(ragged_batch())
    embeds, coords = model.model.embed(batch["input_ids"], batch["pixel_values"])
    state = text_model.start(embeds, batch["attention_mask"], torch.arange(embeds.shape[1])[None], coords)
    choice = text_model.choose(state, 0)
    reduced = text_model.to("meta").apply(state.after(state.hidden_states.to("meta")), 0, choice)
    assert reduced.hidden_states.is_meta and reduced.lengths == lengths_left(state, reduced)
    assert reduced.hidden_states.shape[1] == max(reduced.lengths)


def lengths_left(before: Any, after: Any) -> tuple[int, ...]:
    """Return how many tokens every sample has, by its grids."""
    pairs = zip(before.lengths, before.grids, after.grids, strict=True)
    return tuple(length - num_tokens(old) + num_tokens(new) for length, old, new in pairs)
