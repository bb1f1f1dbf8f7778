"""Ways to call a pyramid: each gives what stock transformers gives, or is refused in one sentence."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from tests.pyramids import IMAGE, VISUAL, prompt
from tests.tiled import tiled_prompt

GREEDY = {"do_sample": False, "max_new_tokens": 5}
FAMILIES = ["llava", "llava_next", "llava_onevision"]


@pytest.fixture
def make_family(make_pair: Any, make_tiled_pair: Any) -> Any:
    """Return `make(family, route) -> (stock model, pyramid model, function that returns a sample)`."""

    def make(family: str, route: tuple[int, ...] | None = (2, 0, 1)) -> tuple[Any, Any, Any]:
        if family == "llava":
            stock, model = make_pair()
            sample = prompt
        else:
            stock, model = make_tiled_pair(family)

            def sample(num_images: int, before: int, after: int, seed: int) -> dict[str, torch.Tensor]:
                return tiled_prompt(model, [(30, 70)] * num_images, before, after, seed)

        model.set_route(route)
        return stock, model, sample

    return make


def packed(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put samples one after another into one row, whose position ids start anew with each."""
    batch = {name: torch.cat([s[name] for s in samples], dim=int(name == "input_ids")) for name in samples[0]}
    return batch | {"position_ids": torch.cat([torch.arange(s["input_ids"].shape[1]) for s in samples])[None]}


def test_the_language_model_is_found_and_replaced_by_the_usual_methods(make_pair: Any) -> None:
    _, model = make_pair()
    names, other = model.state_dict().keys(), copy.deepcopy(model.get_decoder())
    model.set_decoder(other)
    assert model.text_model is model.get_decoder() is other
    assert model.state_dict().keys() == names


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_do_not_see_each_other(make_family: Any, family: str) -> None:
    stock, model, sample = make_family(family, (0, 0, 0))
    samples = [sample(1, 3, 5, 0), sample(1, 2, 7, 1)]
    alone = torch.cat([stock(**each).logits for each in samples], dim=1)
    assert torch.allclose(model(**packed(samples), use_cache=False).logits, alone, atol=1e-4)
    text = packed([prompt(0, 3, 5, 0), prompt(0, 2, 7, 1)])
    with model.teacher():
        assert torch.equal(model(**text, use_cache=False).logits, stock(**text, use_cache=False).logits)
    model.set_route((2, 0, 1))
    assert torch.equal(model(**text, use_cache=False).logits, stock(**text, use_cache=False).logits)
    with pytest.raises(ValueError, match="a row of its own"):
        model(**packed(samples), use_cache=False)


@pytest.mark.parametrize("route", [(0, 0, 0), (2, 0, 1)])
def test_an_image_that_the_mask_hides_does_not_matter(make_pair: Any, route: tuple[int, ...]) -> None:
    stock, model = make_pair()
    model.set_route(route)
    inputs = prompt(2, 2, 9, seed=0)
    columns = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, columns[:VISUAL]] = 0
    is_text = mask.bool() & (inputs["input_ids"] != IMAGE)
    with torch.no_grad():
        logits = model(**inputs, attention_mask=mask).logits[is_text]
        assert model.last_grids == [((12, 12),)]
        other = inputs | {"pixel_values": inputs["pixel_values"] + torch.tensor([1.0, 0.0])[:, None, None, None]}
        assert torch.equal(model(**other, attention_mask=mask).logits[is_text], logits)
        seen = inputs | {"pixel_values": inputs["pixel_values"][1:]}
        kept = mask[0].bool()
        seen["input_ids"], position_ids = seen["input_ids"][:, kept], torch.arange(mask.shape[1])[None, kept]
        ones = torch.ones_like(seen["input_ids"])
        alone = model(**seen, attention_mask=ones, position_ids=position_ids).logits
        assert torch.allclose(alone[seen["input_ids"] != IMAGE], logits, atol=1e-4)
        mask[0, columns] = 0
        expected = stock(**inputs, attention_mask=mask).logits[is_text]
        assert torch.equal(model(**inputs, attention_mask=mask).logits[is_text], expected)


def test_an_image_of_which_the_mask_hides_a_part_is_not_pooled(make_pair: Any) -> None:
    stock, model = make_pair()
    inputs = prompt(1, 2, 3, seed=0)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 5:9] = 0
    model.set_route((0, 0, 0))
    is_text = inputs["input_ids"] != IMAGE
    with torch.no_grad():
        expected = stock(**inputs, attention_mask=mask).logits[is_text]
        assert torch.equal(model(**inputs, attention_mask=mask).logits[is_text], expected)
    model.set_route((2, 0, 1))
    with pytest.raises(ValueError, match="hides a part of an image"):
        model(**inputs, attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_model_of_the_same_tokens_can_draft(make_family: Any, family: str) -> None:
    stock, model, sample = make_family(family)
    inputs = sample(1, 3, 5, 0)
    text_alone = LlamaForCausalLM(stock.config.text_config).eval()
    takes_text = hasattr(stock, "_maybe_prepare_encoder_kwargs_for_generation")  # since 5.16 stock transformers does
    for drafted, drafts in ((model, [text_alone] * takes_text + [stock, model]), (stock, [model])):
        expected = drafted.generate(**inputs, **GREEDY)
        for draft in drafts:
            assert torch.equal(drafted.generate(**inputs, **GREEDY, assistant_model=draft), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_may_give_the_new_tokens_alone(make_family: Any, family: str) -> None:
    _, model, sample = make_family(family)
    first, second = sample(1, 3, 5, 0), sample(1, 2, 4, 1)
    cache = model.new_cache()
    with torch.no_grad():
        model(**first, past_key_values=cache, use_cache=True)
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    new = {"attention_mask": torch.ones_like(ids), **{k: v for k, v in second.items() if k != "input_ids"}}
    answers = [
        model.generate(input_ids=given, **new, **GREEDY, past_key_values=copy.deepcopy(cache))[:, given.shape[1] :]
        for given in (ids, second["input_ids"])
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_caches_of_one_length_are_refused(make_pair: Any, text: str) -> None:
    _, model = make_pair(text)
    inputs = prompt(1, 3, 5, seed=0)
    cache = StaticCache(config=model.config.text_config, max_cache_len=200)
    with pytest.raises(ValueError, match="a StaticCache holds one length for all layers"):
        model.generate(**inputs, **GREEDY, past_key_values=cache)
    with pytest.raises(ValueError, match="DynamicCache cannot"):
        model(**inputs, past_key_values=DynamicCache(config=model.config.text_config))
    for call in (model.init_continuous_batching, model.generate_batch):
        with pytest.raises(NotImplementedError, match="continuous batching"):
            call()


def test_torch_export_is_refused(make_pair: Any) -> None:
    _, model = make_pair()
    with pytest.raises(NotImplementedError, match=r"torch\.export cannot trace a pyramid"):
        torch.export.export(model, (), prompt(1, 3, 5, seed=0), strict=False)


def test_embeddings_in_the_place_of_tokens(make_pair: Any) -> None:
    _, model = make_pair()
    inputs = prompt(1, 3, 5, seed=0)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_the_mask_hides_whole_changes_nothing(make_family: Any, family: str) -> None:
    _, model, sample = make_family(family, None)
    inputs = sample(1, 3, 5, 0)
    with torch.no_grad():
        expected = model(**inputs).logits
        ids = torch.cat([inputs["input_ids"], torch.full_like(inputs["input_ids"], 3)])
        mask = torch.cat([torch.ones_like(inputs["input_ids"]), torch.zeros_like(inputs["input_ids"])])
        got = model(**inputs | {"input_ids": ids}, attention_mask=mask).logits[:1]
    assert torch.allclose(got[inputs["input_ids"] != IMAGE], expected[inputs["input_ids"] != IMAGE], atol=1e-4)


def test_labels_need_no_instruction_where_no_router_is_asked(make_pair: Any) -> None:
    stock, model = make_pair()
    inputs = prompt(1, 3, 5, seed=0)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with pytest.raises(ValueError, match="labels do not show"):
        model(**inputs, labels=labels)
    with model.teacher():
        assert torch.equal(model(**inputs, labels=labels).loss, stock(**inputs, labels=labels).loss)
    model.set_route((2, 0, 1))
    assert model(**inputs, labels=labels).loss.isfinite()


def test_tiles_of_all_images_may_be_stacked(make_tiled_pair: Any) -> None:
    stock, model = make_tiled_pair("llava_next")
    model.set_route((0, 0, 0))
    inputs = tiled_prompt(model, [(30, 70)], 3, 5, seed=0)
    tiles = stock.model.get_image_features(**{k: inputs[k] for k in ("pixel_values", "image_sizes")})
    assert tiles is not None
    count = {1 + height * width for height in (1, 2, 3) for width in (1, 2, 3)}
    for stacked in (inputs["pixel_values"][0, :n] for n in sorted(count)):
        try:
            with torch.no_grad():
                expected = stock(**inputs | {"pixel_values": stacked}).logits
        except (ValueError, RuntimeError):
            continue
        with torch.no_grad():
            assert torch.equal(model(**inputs | {"pixel_values": stacked}).logits, expected)
        return
    pytest.fail("no number of tiles fits")
