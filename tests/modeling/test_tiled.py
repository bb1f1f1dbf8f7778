"""LLaVA-NeXT and LLaVA-OneVision: the pyramid against the stock models, and a batch against its samples one by one."""

from typing import Any

import pytest
import torch

from tests.pyramids import check_batch_equals_one_by_one, generate
from tests.tiled import collate_tiled, tiled_prompt

FAMILIES = ["llava_next", "llava_onevision"]


def ragged(model: Any) -> list[dict[str, torch.Tensor]]:
    """Return six samples: wide, square and tiny images, two that leave hardly a mosaic, none, and two at once."""
    sizes: list[list[tuple[int, int]]] = [[(30, 70)], [(90, 3)], [], [(1, 99), (20, 33)], [(7, 9)], [(30, 1)]]
    words = [(3, 5), (9, 2), (4, 9), (2, 6), (1, 17), (5, 5)]
    return [tiled_prompt(model, s, *w, seed=i) for i, (s, w) in enumerate(zip(sizes, words, strict=True))]


@pytest.mark.parametrize(("family", "text", "layout"), [
    ("llava_next", "llama", "hub"), ("llava_next", "mistral", "new"), ("llava_onevision", "qwen2", "hub"),
])  # fmt: skip
def test_full_route_equals_stock_bit_for_bit(make_tiled_pair: Any, family: str, text: str, layout: str) -> None:
    stock, model = make_tiled_pair(family, text, layout)
    model.set_route((0, 0, 0))
    samples = ragged(model)
    for inputs in (samples[0], collate_tiled(samples)):
        with torch.no_grad():
            assert torch.equal(stock(**inputs).logits, model(**inputs).logits)
        expected, got = generate(stock, inputs), generate(model, inputs)
        assert torch.equal(expected.sequences, got.sequences)
        assert torch.equal(torch.stack(expected.logits), torch.stack(got.logits))


@pytest.mark.parametrize(("family", "text", "attn", "forced"), [
    ("llava_next", "llama", "sdpa", False), ("llava_next", "mistral", "eager", False),
    ("llava_onevision", "qwen2", "sdpa", False), ("llava_onevision", "qwen2", "sdpa", True),
    pytest.param("llava_next", "llama", "sdpa", True, marks=pytest.mark.slow),
    pytest.param("llava_next", "mistral", "eager", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_batch_equals_one_by_one(make_tiled_pair: Any, family: str, text: str, attn: str, forced: bool) -> None:
    _, model = make_tiled_pair(family, text, attn=attn)
    samples = ragged(model)
    check_batch_equals_one_by_one(model, samples, collate_tiled(samples), forced)
    assert len(set(model.last_grids)) >= 5, "the samples must have different tiles"


@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_rows_keep_their_newlines(make_tiled_pair: Any, family: str) -> None:
    """After 2×2, the visual tokens of an image are those of half the rows and columns, each row with one newline."""
    _, model = make_tiled_pair(family, pooling="max")
    text_model = model.text_model
    sample = tiled_prompt(model, [(30, 70)], 2, 3, seed=0)
    visual = {name: sample[name] for name in sample if name != "input_ids"}
    embeds, coords, salience = model.model.embed(sample["input_ids"], **visual)
    newline = model.model.image_newline
    state = text_model.start(embeds, None, torch.arange(embeds.shape[1])[None], coords, salience)
    [(whole, mosaic, newlines)] = state.grids
    assert newlines == (mosaic[0], 1)
    pooled = text_model.apply(state, 0, text_model.take(state, 0, [2]))
    halves = [(-(-h // 2), -(-w // 2)) for h, w in (whole, mosaic)]
    assert pooled.grids == ((*halves, (halves[1][0], 1)),)
    is_newline = (pooled.hidden_states[0] == newline).all(-1)
    start = 3 + halves[0][0] * halves[0][1]
    ends = [start + (row + 1) * (halves[1][1] + 1) - 1 for row in range(halves[1][0])]
    assert is_newline.nonzero()[:, 0].tolist() == ends
    assert (pooled.positions[0].diff() > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_no_cache_agree_with_one_by_one(make_tiled_pair: Any, family: str) -> None:
    stock, model = make_tiled_pair(family)
    samples = ragged(model)
    if not hasattr(stock, "_maybe_prepare_encoder_kwargs_for_generation") and family == "llava_next":
        with pytest.raises(ValueError, match="mix up the images of a sample"):  # stock transformers does so in silence
            generate(model, samples[3], num_beams=3)
        return
    batch = collate_tiled(samples)
    length = batch["input_ids"].shape[1]
    together = generate(model, batch, num_beams=3).sequences[:, length:]
    for i in (1, 3):
        alone = generate(model, samples[i], num_beams=3).sequences[:, samples[i]["input_ids"].shape[1] :]
        assert torch.equal(alone[0], together[i])
    assert torch.equal(generate(model, batch).sequences, generate(model, batch, use_cache=False).sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_brings_another_image(make_tiled_pair: Any, family: str) -> None:
    """`generate` over the cache of a first turn gives what one forward over both turns gives."""
    _, model = make_tiled_pair(family)
    model.set_route((2, 0, 0))
    first, second = (tiled_prompt(model, [size], 3, 4, seed) for seed, size in enumerate([(30, 70), (90, 31)]))
    cache = model.new_cache()
    with torch.no_grad():
        model(**first, past_key_values=cache)
    both = {name: torch.cat([first[name], second[name]], dim=int(name == "input_ids")) for name in first}
    new = {**second, "input_ids": both["input_ids"]}
    continued = generate(model, new, tokens=1, past_key_values=cache).logits[0]
    with torch.no_grad():
        whole = model(**both).logits[:, -1]
    assert (continued - whole).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_decoding_equals_greedy(make_tiled_pair: Any, family: str) -> None:
    _, model = make_tiled_pair(family)
    inputs = tiled_prompt(model, [(30, 70)], 3, 5, seed=4)
    expected = generate(model, inputs, 10).sequences
    assert torch.equal(expected, generate(model, inputs, 10, assistant_model=model).sequences)


def test_what_has_no_pyramid_is_refused(make_tiled_pair: Any) -> None:
    _, model = make_tiled_pair("llava_onevision")
    inputs = tiled_prompt(model, [(30, 70)], 3, 5, seed=4)
    with pytest.raises(NotImplementedError, match="not videos"):
        generate(model, {**inputs, "pixel_values_videos": torch.zeros(1, 2, 3, 20, 20)})
    with pytest.raises(NotImplementedError, match="not videos"):
        model(**inputs, pixel_values_videos=torch.zeros(1, 2, 3, 20, 20))
    with pytest.raises(ValueError, match="pass image_sizes"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
