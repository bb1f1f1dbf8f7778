"""What holds for every kind of expert: exact counts, and the same answers in any batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_cli.modeling.engine import compact
from dpn_cli.modeling.experts.registry import ASSIGNMENTS, assign
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.experts import KEEP, KINDS, Expert, examples, num_tokens
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.modeling.experts.states import state_of, tiny_text_model
from tests.pyramids import VISUAL, collate, prompt, ragged_batch

EXPERTS = [Expert.parse(text) for text in examples()]
USUAL = [each for each in EXPERTS if not (each.share and each.cells) or each.kind == "diverse"]  # one that merges
READING = [
    each for each in USUAL if each.kind in ("pool", "diverse", "attended", "relevant", "guided", "exit")
]  # all ways
kinds = pytest.mark.parametrize("expert", EXPERTS, ids=str)


def static(expert: Expert, *after_layers: int) -> dict[str, Any]:
    """Return the settings of a pyramid whose sites all take one expert, then exit after layer 5."""
    after_layers = after_layers[-1:] if expert.share and expert.cells else after_layers  # it needs a grid
    sites = [*(Site(layer, (KEEP, expert)) for layer in after_layers), Site(5, (KEEP, Expert("exit")))]
    return {
        "sites": tuple(sites), "static_route": (1,) * len(sites), "min_visual_tokens": 1, "attention": "sized"
    }  # fmt: skip


def test_every_kind_has_an_assignment_and_a_name_that_reads_back() -> None:
    assert ASSIGNMENTS.keys() == KINDS.keys()
    assert [Expert.parse(str(expert)) for expert in EXPERTS] == EXPERTS
    assert all(kind.about and kind.source for kind in KINDS.values())


@kinds
def test_a_recipe_takes_it_and_a_config_keeps_it(expert: Expert) -> None:
    other = "exit" if expert == KEEP else str(expert)
    recipe = load_recipe("demo", [f"pyramid.sites=[{{after: 0, experts: [keep, '{other}']}}]"])
    config = recipe.pyramid_config(8)
    assert str(config.sites[0].experts[1]) == other and config.sites[0].after_layer == -1
    assert PyramidConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("text", ["", "pool", "pool:2", "diverse", "diverse:2", "diverse:0", "exit:0.5", "best:0.5"])
def test_what_is_no_expert_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match="is not an expert: expected"):
        Expert.parse(text)


grids = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3).map(tuple)
samples = st.lists(st.tuples(grids, st.sampled_from(EXPERTS), st.integers(0, 3)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(samples, st.integers(0, 999), st.booleans())
def test_what_is_left_is_what_the_grids_say_and_text_stays(batch: list, seed: int, again: bool) -> None:
    """Ragged batches of any experts: one alone, after a selection, with newline columns, several images."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample_grids, _, text in batch:
        cells = [[[g, r, c] for r in range(h) for c in range(w)] for g, (h, w) in enumerate(sample_grids)]
        rows.append(torch.tensor([[-1] * 3] * text + [cell for grid in cells for cell in grid] + [[-1] * 3] * 2))
    longest = max(map(len, rows))
    coords = torch.stack([torch.nn.functional.pad(r, (0, 0, longest - len(r), 0), value=-1) for r in rows])
    valid = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows])
    text_model = tiny_text_model()
    hidden = torch.randn(*coords.shape[:2], text_model.config.hidden_size, generator=generator)
    state = state_of(hidden, coords, tuple(each for each, _, _ in batch), None if valid.all() else valid)
    chosen = [expert if expert.is_offered(each, 1) else KEEP for each, expert, _ in batch]
    before, after = state, reduced(text_model, state, chosen)
    if again:
        chosen = [Expert("stride", share=0.5) if num_tokens(each) > 1 else KEEP for each in after.grids]
        before, after = after, reduced(text_model, after, chosen)
    for b, (expert, old, text) in enumerate(zip(chosen, before.grids, (t for _, _, t in batch), strict=True)):
        tokens = after.coords[b] if after.valid is None else after.coords[b][after.valid[b]]
        assert int((tokens[:, 0] >= 0).sum()) == num_tokens(expert.left(old)) == num_tokens(after.grids[b])
        assert int((tokens[:, 0] < 0).sum()) == text + 2
        if after.sizes is not None and (expert.kind == "pool" or (expert.share and expert.cells)):
            own = before.lengths[b] if before.sizes is None else before.sizes[b].sum()
            assert after.sizes[b].sum() == own, "what is merged stands for all that it was"


def reduced(text_model: Any, state: Any, experts: list[Expert]) -> Any:
    """Return a state after a site, as `apply` makes it."""
    from dataclasses import replace

    after = compact(state, assign(text_model, state, experts, next_layer=1), sized=True)
    pairs = list(zip(experts, state.grids, state.coord_grids, strict=True))
    return replace(
        after,
        grids=tuple(expert.left(each) for expert, each, _ in pairs),
        coord_grids=tuple(cells if expert.share else expert.left(cells) for expert, _, cells in pairs),
    )


@kinds
def test_neither_autocast_nor_the_default_dtype_changes_which_tokens_stay(expert: Expert) -> None:
    coords = torch.tensor([[[-1] * 3, *([0, row, column] for row in range(8) for column in range(8)), *[[-1] * 3] * 4]])
    text_model = tiny_text_model()
    hidden = torch.randn(1, coords.shape[1], text_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    state = state_of(hidden, coords, (((8, 8),),))

    def target() -> torch.Tensor:
        with torch.no_grad():
            return assign(text_model, state, [expert], next_layer=1).target

    expected = target()
    with torch.autocast("cpu", torch.bfloat16):
        if expert.kind != "attended":  # whose attention is the model's, and as coarse
            assert torch.equal(target(), expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(target(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("expert", "side"),
    [pytest.param(expert, "left", marks=[] if expert in USUAL else pytest.mark.slow) for expert in EXPERTS]
    + [
        pytest.param(expert, "right", marks=[] if expert.kind in ("pool", "attended") else pytest.mark.slow)
        for expert in EXPERTS
    ],
    ids=str,
)
def test_a_batch_gives_what_its_samples_give_alone(make_pair: Any, expert: Expert, side: str) -> None:
    _, model = make_pair(**static(expert, -1, 2))
    model.double()  # in which what ranks alike in one batch does so in any
    samples = ragged_batch()
    with torch.no_grad():
        together = model(**collate(samples, side)).logits
        for i, sample in enumerate(samples):
            alone = model(**sample).logits[0]
            rows = together[i, -len(alone) :] if side == "left" else together[i, : len(alone)]
            assert (rows - alone).abs().max() < (1e-3 if side == "left" else 1e-8), "positions are in float32"
    [route] = model.last_routes
    fraction = flops_fraction(model.text_model.shape, model.pyramid, route, model.last_grids[0], 11)
    assert fraction < 1 or expert == KEEP


@pytest.mark.parametrize(
    "expert", [pytest.param(each, marks=[] if each in READING else pytest.mark.slow) for each in EXPERTS], ids=str
)
def test_generation_with_beams_a_second_turn_and_no_cache(make_pair: Any, expert: Expert) -> None:
    _, model = make_pair(**static(expert, -1, 2))
    model.double()
    greedy = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 3}
    samples = ragged_batch()[1:4]  # with one image, none and two
    batch = collate(samples)
    length = batch["input_ids"].shape[1]
    beams = model.generate(**batch, num_beams=2, **greedy)[:, length:]
    for i, sample in enumerate(samples):
        alone = model.generate(**sample, num_beams=2, **greedy)[0, sample["input_ids"].shape[1] :]
        assert torch.equal(alone, beams[i])
    assert torch.equal(model.generate(**batch, **greedy), model.generate(**batch, use_cache=False, **greedy))

    first, cache = prompt(1, 3, 5, seed=0), model.new_cache()
    with torch.no_grad():
        model(**first, past_key_values=cache, use_cache=True)
        words = torch.tensor([[7, 8, 9]])
        later = model(input_ids=words, past_key_values=cache, use_cache=True).logits
        both = torch.cat([first["input_ids"], words], dim=1)
        instruction = torch.tensor([first["input_ids"].shape[1] - 1])
        whole = model(input_ids=both, pixel_values=first["pixel_values"], instruction=instruction).logits[:, -3:]
    assert (later - whole).abs().max() < 1e-8
    assert first["input_ids"].shape[1] == VISUAL + 9
