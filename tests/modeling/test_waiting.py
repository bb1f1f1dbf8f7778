"""A prefill waits for the device once, and once more for every decision of a router.

What experts have to know on the host follows from the grids.
"""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dpn_cli.pyramid.config import RouterConfig, Site
from dpn_cli.pyramid.cost import offer
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
    embeds, coords, salience = model.model.embed(batch["input_ids"], batch["pixel_values"])
    state = text_model.start(embeds, batch["attention_mask"], torch.arange(embeds.shape[1])[None], coords, salience)
    choice = text_model.choose(state, 0)
    reduced = text_model.to("meta").apply(state.after(state.hidden_states.to("meta")), 0, choice)
    assert reduced.hidden_states.is_meta and reduced.lengths == lengths_left(state, reduced)
    assert reduced.hidden_states.shape[1] == max(reduced.lengths)


def lengths_left(before: Any, after: Any) -> tuple[int, ...]:
    """Return how many tokens every sample has, by its grids."""
    pairs = zip(before.lengths, before.grids, after.grids, strict=True)
    return tuple(length - num_tokens(old) + num_tokens(new) for length, old, new in pairs)


class Reads(TorchFunctionMode):
    """Counts the calls that hand a tensor's values to the host."""

    READING = (
        "cpu",
        "tolist",
        "item",
        "numpy",
        "nonzero",
        "masked_select",
        "unique",
        "__bool__",
        "__int__",
        "__float__",
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        indices = args[1] if name in ("__getitem__", "__setitem__") else ()
        by_mask = any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for each in (indices if isinstance(indices, tuple) else (indices,))
        )
        if name in self.READING or by_mask:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("names", [("1x2", "2x2"), ("diverse:0.5", "attended:0.5")])
def test_routers_are_waited_for_once_a_site(make_pair: Any, names: tuple[str, ...]) -> None:
    experts = (KEEP, *map(Expert.parse, names))
    _, model = make_pair(sites=tuple(Site(layer, experts) for layer in (-1, 3, 5)), min_visual_tokens=1)
    text_model = model.text_model
    batch = collate(ragged_batch())
    embeds, coords, salience = model.model.embed(batch["input_ids"], batch["pixel_values"])
    state = text_model.start(embeds, batch["attention_mask"], torch.arange(embeds.shape[1])[None], coords, salience)
    with torch.no_grad(), Reads() as reads:
        end = text_model.run(state, text_model.new_cache())
    assert len(set(end.routes)) > 1, "the routers should disagree"
    assert reads.calls == ["tolist"] * 3


def test_what_a_sample_is_offered_is_worked_out_once_for_all_of_its_size(make_pair: Any) -> None:
    _, model = make_pair()
    batch = collate(ragged_batch())
    with torch.no_grad():
        model(**batch)
        offer.cache_clear()
        model(**batch)
        worked_out = offer.cache_info().misses
        model(**batch)
    assert offer.cache_info().misses == worked_out
