"""The pyramid against stock transformers, and a batch against its samples one by one."""

from itertools import product
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dpn_cli.families.text import TEXT_MODELS
from tests.pyramids import (
    RAGGED_ROUTES,
    check_batch_equals_one_by_one,
    collate,
    generate,
    prompt,
    pyramid,
    ragged_batch,
)


def share_weights(stock: Any, model: Any) -> None:
    """Let both have the very same tensors: some CPUs' kernels for a single token round by where weights lie."""
    own = dict(model.named_parameters())
    for name, weight in stock.named_parameters():
        assert torch.equal(own[name], weight)
        own[name].data = weight.data


def new_tokens(output: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return output.sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    ("text", "layout"),
    [*((text, "hub") for text in TEXT_MODELS), ("llama", "new")]
    + [pytest.param(text, "new", marks=pytest.mark.slow) for text in TEXT_MODELS if text != "llama"],
)
def test_full_route_equals_stock_bit_for_bit(make_pair: Any, text: str, layout: str) -> None:
    stock, model = make_pair(text, layout=layout)
    share_weights(stock, model)
    model.set_route((0, 0, 0))
    for inputs in (prompt(1, 3, 5, seed=0), collate(ragged_batch())):
        with torch.no_grad():
            assert torch.equal(stock(**inputs).logits, model(**inputs).logits)
        expected, got = generate(stock, inputs), generate(model, inputs)
        assert torch.equal(expected.sequences, got.sequences)
        assert torch.equal(torch.stack(expected.logits), torch.stack(got.logits))


def test_teacher_is_stock_and_leaves_the_routers_as_they_were(make_pair: Any) -> None:
    stock, model = make_pair()
    inputs = prompt(1, 3, 5, seed=0)
    with torch.no_grad():
        routed = model(**inputs).logits
        with model.teacher():
            assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
        assert torch.equal(model(**inputs).logits, routed)
    assert not torch.allclose(routed, stock(**inputs).logits)


USUAL = {("mistral", "sdpa", False), ("qwen2", "sdpa", False), ("qwen3", "sdpa", False), ("qwen3", "eager", True)}


@pytest.mark.parametrize(
    ("text", "attn", "forced"),
    [
        pytest.param(*case, marks=[] if case[0] == "llama" or case in USUAL else pytest.mark.slow)
        for case in product(TEXT_MODELS, ("sdpa", "eager"), (True, False))
    ],
)
def test_batch_equals_one_by_one(make_pair: Any, text: str, attn: str, forced: bool) -> None:
    _, model = make_pair(text, attn)
    samples = ragged_batch()
    check_batch_equals_one_by_one(model, samples, collate(samples), forced)


@pytest.mark.parametrize(
    ("positions", "gate", "pooling"),  # every two of them
    [
        ("persistent", "none", "avg"), ("contiguous", "probability", "avg"),
        ("persistent", "probability", "max"), ("contiguous", "none", "max"),
        ("persistent", "none", "conv"), ("contiguous", "probability", "conv"),
    ],
)  # fmt: skip
def test_every_kind_of_pyramid_batches_exactly(make_pair: Any, positions: str, gate: str, pooling: str) -> None:
    _, model = make_pair(positions=positions, gate=gate, pooling=pooling)
    samples = ragged_batch()
    alone = [generate(model, sample, tokens=4) for sample in samples]
    batch = collate(samples)
    together = generate(model, batch, tokens=4)
    for i, one in enumerate(alone):
        for step_alone, step_together in zip(one.logits, together.logits, strict=True):
            assert (step_alone[0] - step_together[i]).abs().max() < 1e-4


@torch.no_grad()
def test_conv_starts_as_the_average(make_pair: Any) -> None:
    sample = prompt(1, 3, 5, seed=0)
    logits = []
    for pooling in ("avg", "conv"):
        _, model = make_pair(pooling=pooling, min_visual_tokens=1)
        model.set_route((2, 2, 2))  # 12, 6, 3 and 2 tokens a side: in the end, cells that are not complete
        logits.append(model(**sample).logits)
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("gate", ["none", "probability"])
def test_a_forced_route_gives_what_the_router_that_takes_it_gives(make_pair: Any, gate: str) -> None:
    # An image that is pooled 2×2 has 36 tokens, too few to be pooled (or gated) again.
    _, model = make_pair(gate=gate, positions="contiguous", min_input_tokens=40)
    batch = collate(ragged_batch())
    routed = generate(model, batch, tokens=4)
    routes = model.last_routes
    assert len(set(routes)) >= 3
    model.set_route(routes)
    forced = generate(model, batch, tokens=4)
    assert model.last_routes == routes
    assert torch.equal(torch.stack(forced.logits), torch.stack(routed.logits))


@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_beams_in_a_batch_equal_beams_one_by_one(make_pair: Any, attn: str) -> None:
    _, model = make_pair(attn=attn)
    samples = ragged_batch()
    batch = collate(samples)
    together = new_tokens(generate(model, batch, num_beams=3), batch)
    for i, sample in enumerate(samples):
        assert torch.equal(new_tokens(generate(model, sample, num_beams=3), sample)[0], together[i])


def test_cache_equals_no_cache(make_pair: Any) -> None:
    _, model = make_pair()
    batch = collate(ragged_batch())
    cached, plain = generate(model, batch), generate(model, batch, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    assert (torch.stack(cached.logits) - torch.stack(plain.logits)).abs().max() < 1e-4


@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_second_turn_on_the_same_cache(make_pair: Any, attn: str) -> None:
    _, model = make_pair(attn=attn)
    samples = ragged_batch()
    turn = torch.arange(6 * 5).view(6, 5) + 20

    def two_turns(inputs: dict[str, torch.Tensor], extra: torch.Tensor) -> Any:
        cache = model.new_cache()
        first = generate(model, inputs, past_key_values=cache)
        ids = torch.cat([first.sequences, extra], dim=1)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
        second = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
        return second.sequences[:, ids.shape[1] :], torch.stack(second.logits)

    tokens, logits = two_turns(collate(samples), turn)
    for i, sample in enumerate(samples):
        tokens_alone, logits_alone = two_turns(sample, turn[i : i + 1])
        assert torch.equal(tokens_alone[0], tokens[i])
        assert (logits_alone[:, 0] - logits[:, i]).abs().max() < 1e-4


def test_second_turn_equals_one_long_conversation(make_pair: Any) -> None:
    """The prefill of turn two over the cache gives what one forward over both turns gives."""
    _, model = make_pair()
    model.set_route((2, 0, 1))
    inputs = prompt(1, 3, 5, seed=0)
    extra = torch.tensor([[20, 21, 22, 23]])
    cache = model.new_cache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        continued = model(input_ids=extra, past_key_values=cache).logits
        whole = model(input_ids=torch.cat([inputs["input_ids"], extra], 1), pixel_values=inputs["pixel_values"]).logits[
            :, -4:
        ]
    assert (continued - whole).abs().max() < 1e-4


def test_second_turn_may_bring_another_image(make_pair: Any) -> None:
    _, model = make_pair()
    model.set_route((1, 2, 0))
    first, second = prompt(1, 3, 5, seed=0), prompt(1, 2, 4, seed=1)
    cache = model.new_cache()
    with torch.no_grad():
        model(**first, past_key_values=cache)
        continued = model(**second, past_key_values=cache).logits[:, -1]
        whole = model(
            input_ids=torch.cat([first["input_ids"], second["input_ids"]], 1),
            pixel_values=torch.cat([first["pixel_values"], second["pixel_values"]]),
        ).logits[:, -1]
    assert (continued - whole).abs().max() < 1e-4


@pytest.mark.parametrize("assistant", ["prompt lookup", "itself"])
def test_assisted_decoding_equals_greedy(make_pair: Any, assistant: str) -> None:
    _, model = make_pair()
    inputs = prompt(1, 3, 5, seed=4)
    how = {"prompt_lookup_num_tokens": 3} if assistant == "prompt lookup" else {"assistant_model": model}
    assert torch.equal(generate(model, inputs, 12).sequences, generate(model, inputs, 12, **how).sequences)


def test_right_padding_and_labels(make_pair: Any) -> None:
    """Training batches: routers read the token before the first label, and the loss ignores the padding."""
    _, model = make_pair()
    samples = ragged_batch()
    for sample in samples:
        sample["labels"] = sample["input_ids"].clone()
        sample["labels"][:, :-2] = -100
    with torch.no_grad():
        alone = [model(**sample) for sample in samples]
        batch = collate(samples, side="right")
        longest = batch["input_ids"].shape[1]
        labels = [
            torch.nn.functional.pad(s["labels"], (0, longest - s["labels"].shape[1]), value=-100) for s in samples
        ]
        together = model(**batch, labels=torch.cat(labels))
    for i, (sample, one) in enumerate(zip(samples, alone, strict=True)):
        length = sample["input_ids"].shape[1]
        text = sample["input_ids"][0] != 4
        difference = (one.logits[0] - together.logits[i, :length])[text]
        assert difference.abs().max() < 1e-4
    assert together.loss == pytest.approx(torch.stack([one.loss for one in alone]).mean().item(), abs=1e-5)


def test_routers_read_the_last_instruction_token(make_pair: Any) -> None:
    _, model = make_pair()
    inputs = prompt(1, 3, 5, seed=0)
    with torch.no_grad():
        model(**inputs)
        route = model.last_routes
        answer = torch.randint(5, 300, (1, 6), generator=torch.Generator().manual_seed(9))
        ids = torch.cat([inputs["input_ids"], answer], dim=1)
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], dim=1)
        model(input_ids=ids, pixel_values=inputs["pixel_values"], labels=labels)
    assert model.last_routes == route


def test_the_cue_is_found_in_embeddings_as_in_tokens(make_pair: Any) -> None:
    _, model = make_pair(answer_cue=(301, 302))
    inputs = prompt(1, 3, 5, seed=0)
    pixels, cue = inputs["pixel_values"], torch.tensor([[301, 302]])
    answer = torch.randint(5, 300, (1, 6), generator=torch.Generator().manual_seed(9))
    asked = torch.cat([inputs["input_ids"], cue], dim=1)
    ids = torch.cat([asked, answer], dim=1)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        model(input_ids=asked, pixel_values=pixels)
        route, logits = model.last_routes, model(input_ids=ids, pixel_values=pixels).logits
        assert torch.equal(model(inputs_embeds=embeds, pixel_values=pixels).logits, logits)
        assert model.last_routes == route
        whole = model(inputs_embeds=embeds, pixel_values=pixels, labels=ids)
        assert torch.equal(whole.logits, logits) and model.last_routes == route


def test_the_default_dtype_changes_no_route(make_pair: Any) -> None:
    _, model = make_pair()
    batch = collate(ragged_batch())
    with torch.no_grad():
        expected, routes = model(**batch).logits, model.last_routes
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = model(**batch).logits
        finally:
            torch.set_default_dtype(torch.float32)
    assert model.last_routes == routes and torch.equal(found, expected)


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_gradients_are_the_same_with_checkpointing(make_pair: Any, checkpointing: dict[str, bool]) -> None:
    _, model = make_pair(gate="probability")
    model.train()
    model.set_route(RAGGED_ROUTES[1])
    sample = prompt(1, 3, 5, seed=0)
    sample["labels"] = sample["input_ids"].clone()
    sample["labels"][:, :-3] = -100

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**sample, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_probability_gate_sends_gradients_to_the_routers(make_pair: Any) -> None:
    _, model = make_pair(gate="probability")
    sample = prompt(1, 3, 5, seed=0)
    sample["labels"] = torch.where(torch.arange(sample["input_ids"].shape[1]) > 150, sample["input_ids"], -100)
    model(**sample).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.text_model.routers.parameters())


def test_logits_to_keep(make_pair: Any) -> None:
    _, model = make_pair()
    model.set_route((2, 0, 1))
    inputs = prompt(1, 3, 5, seed=0)
    with torch.no_grad():
        assert torch.allclose(model(**inputs, logits_to_keep=2).logits, model(**inputs).logits[:, -2:], atol=1e-5)


def test_hidden_states_show_the_pyramid(make_pair: Any) -> None:
    _, model = make_pair()
    model.set_route((2, 0, 1))
    inputs = prompt(1, 3, 5, seed=0)
    with torch.no_grad():
        lengths = [h.shape[1] for h in model(**inputs, output_hidden_states=True).hidden_states]
    text = inputs["input_ids"].shape[1] - 144
    assert lengths[:8] == [144 + text] * 3 + [36 + text] * 4 + [18 + text]  # the embeddings, then layers 0 to 6


@pytest.mark.parametrize(
    ("named", "indices"),
    [
        ("1x1,1x2,2x2", (0, 1, 2)),
        ("keep, pool:1x2, keep", (0, 1, 0)),
        (["1x2,keep,keep", "keep,keep,2x2"], [(1, 0, 0), (0, 0, 2)]),
        (["1x2,keep,keep", (0, 0, 2)], [(1, 0, 0), (0, 0, 2)]),
    ],
)
def test_a_route_may_be_named_or_numbered(make_pair: Any, named: Any, indices: Any) -> None:
    _, model = make_pair()
    batch = collate(ragged_batch()[:2])
    model.set_route(named)
    with torch.no_grad():
        logits = model(**batch).logits
        routes = model.last_routes
        with model.on_route(indices):
            assert torch.equal(model(**batch).logits, logits)
    assert routes == model.last_routes == (indices if isinstance(indices, list) else [indices] * 2)
    for wrong in ("keep,keep", "keep,keep,half", ["keep,keep,keep", "exit"]):
        with pytest.raises(ValueError, match=r"expected 3 experts|not an expert of site 2: expected one of keep"):
            model.set_route(wrong)


def test_what_cannot_be_right_raises(make_pair: Any) -> None:
    _, model = make_pair()
    inputs = prompt(1, 3, 5, seed=0)
    with pytest.raises(ValueError, match="new_cache"):
        model(**inputs, past_key_values=DynamicCache())
    for implementation in ("static", "quantized", "offloaded_static"):
        with pytest.raises(ValueError, match="cache_implementation"):
            generate(model, inputs, cache_implementation=implementation)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(model, inputs, prefill_chunk_size=16)
    with pytest.raises(NotImplementedError, match="paged"):
        model.generate_batch([[1, 2]])
    with pytest.raises(ValueError, match="min_visual_tokens"):
        model.set_route((2, 2, 0))
    with pytest.raises(ValueError, match="3 sites"):
        model.set_route((0, 0))
    with pytest.raises(ValueError, match="not calibrated"):
        model.set_budget(0.5)
    model.set_route([(0, 0, 0)] * 2)
    with pytest.raises(ValueError, match="2 routes"):
        model(**collate(ragged_batch()[:3]))


def test_sliding_windows_are_refused(make_pair: Any) -> None:
    from transformers import MistralConfig

    from dpn_cli.modeling.pyramid_text import PyramidMistralModel

    with pytest.raises(ValueError, match="sliding"):
        PyramidMistralModel(MistralConfig(sliding_window=64), pyramid())
