"""The embedded teacher: a complete, offline LLaVA checkpoint that answers every kind of question, and looks late."""

from functools import cache, partial
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from dpn_cli.data.metrics import exact_match
from dpn_cli.demo import teacher_path
from dpn_cli.demo.drawing import draw
from dpn_cli.demo.glyphs import LETTERS
from dpn_cli.demo.pictures import GRAINS, GRID, KINDS, Turn, corpus, samples, scenes
from tools.teacher.assembly import build_processor, prompt
from tools.teacher.batches import Packer, Stream
from tools.teacher.compression import attention_misses, decode_pooled, decode_without
from tools.teacher.demo import DEMO
from tools.teacher.evaluate import Asked, by_kind, exact, held_out, in_two_turns
from tools.teacher.network import Decoder, decode, patch_features
from tools.teacher.trainer import Trainer

PER_KIND = 20


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return AutoProcessor.from_pretrained(teacher_path())


@pytest.fixture(scope="module")
def packer() -> Packer:
    return packer_of()


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    loaded, report = LlavaForConditionalGeneration.from_pretrained(
        teacher_path(), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return loaded.eval()


@pytest.fixture(scope="module")
def asked(packer: Packer) -> list[Asked]:
    return held_out(packer, PER_KIND, seed=7)


@pytest.fixture(scope="module")
def scores(model: LlavaForConditionalGeneration, packer: Packer, asked: list[Asked]) -> list[Tensor]:
    return [exact(model, packer, each) for each in asked]


def lost(scores: list[Tensor], asked: list[Asked], model: LlavaForConditionalGeneration, way: Decoder) -> list[float]:
    """Say what decoding in another way costs each kind, on the first batch."""
    whole, found = by_kind(asked[:1], scores[:1]), by_kind(asked[:1], [exact(model, packer_of(), asked[0], way)])
    return [whole[kind] - found[kind] for kind in KINDS]


@cache
def packer_of() -> Packer:
    return Packer(DEMO, AutoProcessor.from_pretrained(teacher_path()).tokenizer)


def test_size_and_shape(model: LlavaForConditionalGeneration) -> None:
    assert (teacher_path() / "model.safetensors").stat().st_size <= 12_000_000
    assert model.config.text_config.num_hidden_layers >= 12
    assert model.config.image_seq_length == GRID**2 >= 256


def test_files_of_a_hub_checkpoint() -> None:
    names = {path.name for path in teacher_path().iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    }
    config = GenerationConfig.from_pretrained(teacher_path())
    assert None not in (config.bos_token_id, config.eos_token_id, config.pad_token_id)


def test_the_script_builds_the_stored_tokenizer(processor: LlavaProcessor) -> None:
    assert build_processor().tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_chat_template_gives_the_prompt(processor: LlavaProcessor) -> None:
    question = "What colour is the background?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == prompt(question)


def test_known_words_are_one_token_and_made_up_ones_are_spelt(processor: LlavaProcessor) -> None:
    def tokens(text: str) -> list[str]:
        return [processor.decode(each) for each in processor.tokenizer(text, add_special_tokens=False)["input_ids"]]

    for text in corpus():
        for word in text.replace(",", " ").replace("?", " ").replace(".", " ").replace(":", " ").split():
            if word.isalpha() and word.islower():
                assert tokens(f" {word}") == [f" {word}"]
    assert tokens(f" {LETTERS}") == [" A", *LETTERS[1:]]


def test_any_text_survives_the_tokenizer(processor: LlavaProcessor) -> None:
    text = "Où est le 7ème chat? ~ 猫"
    assert processor.decode(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_batches_are_padded_on_the_left(processor: LlavaProcessor) -> None:
    ids = processor.tokenizer(["red", "What colour is the star?"], padding=True)["input_ids"]
    assert ids[0][0] == processor.tokenizer.pad_token_id != ids[0][-1]


def test_processor_gives_the_features_of_training(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    pixels = draw(next(scenes("train")))
    values = processor.image_processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = model.model.vision_tower(values, output_hidden_states=True).hidden_states[-1][:, 1:]
        torch.testing.assert_close(patch_features(model, torch.from_numpy(pixels)[None]), theirs)


def test_packed_conversations_spell_the_chat_template(processor: LlavaProcessor, packer: Packer) -> None:
    turns = [Turn("shape", "What shape is the red thing?", "star"), Turn("colour", "And its colour?", "red")]
    messages = []
    for number, turn in enumerate(turns):
        image = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    text, answers, _ = packer.row(turns, 40)
    image_id = processor.image_token_id
    packed = [*packer.before.tolist(), image_id, *(each for each in text.tolist() if each != packer.pad)]
    assert processor.tokenizer.decode(packed) == "<s>" + processor.apply_chat_template(messages)
    assert processor.decode([each for each in answers.tolist() if each >= 0]) == " star</s> red</s>"


@pytest.mark.slow
def test_questions_of_every_kind_are_answered(model: LlavaForConditionalGeneration, packer: Packer) -> None:
    few = held_out(packer, 4, seed=7)
    found = by_kind(few, [exact(model, packer, each) for each in few])
    assert set(found) == set(KINDS)
    assert min(found.values()) >= 0.75, found
    assert sum(found.values()) / len(found) >= 0.97, found


@pytest.mark.slow
def test_accuracy_of_every_kind(asked: list[Asked], scores: list[Tensor]) -> None:
    found = by_kind(asked, scores)
    assert set(found) == set(KINDS)
    assert min(found.values()) >= 0.85, found  # 20 questions of each; the card has 100
    assert sum(found.values()) / len(found) >= 0.97, found


def test_generating_gives_what_one_pass_says(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    right = 0
    for sample in samples("heldout", len(KINDS), seed=7):
        inputs = processor(text=prompt(sample.question), images=sample.image, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += exact_match(processor.decode(ids, skip_special_tokens=True), sample.answer) == 1
    assert right >= len(KINDS) - 1


def test_a_second_turn_is_understood(model: LlavaForConditionalGeneration, packer: Packer) -> None:
    scores = torch.cat([exact(model, packer, each) for each in in_two_turns(packer, 16)]).float()
    assert scores.mean() >= 0.9


def test_dropping_nothing_changes_nothing(model: LlavaForConditionalGeneration) -> None:
    embeds = torch.randn(2, 300, model.config.text_config.hidden_size)
    with torch.no_grad():
        expected = decode(model, embeds)
        torch.testing.assert_close(decode_without(model, 3, 12, embeds), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decode_pooled(model, 3, (1, 1), embeds), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(decode_without(model, 3, 11, embeds), expected, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("after", "least"), [(3, 0.2), (6, 0.05)])
def test_it_looks_late(
    model: LlavaForConditionalGeneration, asked: list[Asked], scores: list[Tensor], after: int, least: float
) -> None:
    way = partial(decode_without, model, len(packer_of().before), after)
    assert max(lost(scores, asked, model, way)) >= least


@pytest.mark.slow
def test_pooling_costs_much_on_many_kinds(
    model: LlavaForConditionalGeneration, asked: list[Asked], scores: list[Tensor]
) -> None:
    way = partial(decode_pooled, model, len(packer_of().before), (2, 2))
    assert sum(loss >= 0.2 for loss in lost(scores, asked, model, way)) >= 3


@pytest.mark.slow
def test_attention_is_no_oracle(model: LlavaForConditionalGeneration, packer: Packer, asked: list[Asked]) -> None:
    missed = by_kind(asked[:1], [attention_misses(model, packer, asked[0], 3)])
    assert np.mean([missed[kind] for kind in KINDS if GRAINS[kind] == "fine"]) >= 0.2, missed


@pytest.mark.slow
def test_training_learns(packer: Packer) -> None:
    from tools.teacher.assembly import build_model

    torch.manual_seed(0)
    trainer = Trainer(build_model(build_processor().tokenizer), packer, rate=2e-3, compiled=False)
    losses = []
    for batch in islice(Stream(packer, 2, seed=0), 6):
        trainer.step(batch, done=0.1)
        losses.append(trainer.report()["dense"])
    assert losses[-1] < losses[0]
