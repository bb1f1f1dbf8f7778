"""The embedded teacher: a complete, offline LLaVA checkpoint that answers every kind of question."""

import pytest
import torch
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from dpn_cli.demo import teacher_path
from dpn_cli.demo.pictures import GRAINS, KINDS, Sample, answers, samples
from tools.teacher.assembly import prompt
from tools.teacher.evaluate import accuracy
from tools.teacher.packing import Packer
from tools.teacher.train_vision import pixel_batch, scenes

PER_KIND = 60


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return AutoProcessor.from_pretrained(teacher_path())


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    loaded, report = LlavaForConditionalGeneration.from_pretrained(
        teacher_path(), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return loaded.eval()


@pytest.fixture(scope="module")
def held_out() -> list[Sample]:
    return list(samples("heldout", PER_KIND * len(KINDS), seed=7))


def test_size_and_shape(model: LlavaForConditionalGeneration) -> None:
    assert model.num_parameters() <= 5_000_000
    assert (teacher_path() / "model.safetensors").stat().st_size <= 10_000_000
    assert model.config.text_config.num_hidden_layers >= 8
    assert model.config.image_seq_length >= 144


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


def test_chat_template_gives_the_prompt(processor: LlavaProcessor) -> None:
    question = "What colour is the background?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == prompt(question)


def test_every_answer_is_one_token(processor: LlavaProcessor) -> None:
    for answer in answers():
        tokens = processor.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        assert len(tokens) == 1 and processor.decode(tokens) == f" {answer}"


def test_any_text_survives_the_tokenizer(processor: LlavaProcessor) -> None:
    text = "Où est le 7ème chat? ~ 猫"
    assert processor.decode(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_batches_are_padded_on_the_left(processor: LlavaProcessor) -> None:
    ids = processor.tokenizer(["red", "What colour is the star?"], padding=True)["input_ids"]
    assert ids[0][0] == processor.tokenizer.pad_token_id != ids[0][-1]


def test_processor_gives_the_pixels_of_training(processor: LlavaProcessor) -> None:
    scene = next(scenes("train"))
    pixels = processor.image_processor(scene.draw(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, pixel_batch([scene]))


def test_packed_rows_spell_the_prompt(processor: LlavaProcessor) -> None:
    packer = Packer(processor.tokenizer)
    image_tokens = packer.prefix.count(processor.image_token_id)
    question = "Which shape is red?"
    spelled = processor.tokenizer(prompt(question).replace("<image>", "<image>" * image_tokens))["input_ids"]
    assert spelled[: len(packer.prefix)] == packer.prefix


def test_accuracy_of_every_kind(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, held_out: list[Sample]
) -> None:
    found = accuracy(model, processor, held_out)
    assert set(found) == set(KINDS) and min(found.values()) >= 0.95, found


def test_strong_pooling_costs_fine_questions(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, held_out: list[Sample]
) -> None:
    few = held_out[: 20 * len(KINDS)]
    whole = accuracy(model, processor, few)
    pooled = accuracy(model, processor, few, ((2, 2), (1, 2), (1, 1)))
    loss = {kind: whole[kind] - pooled[kind] for kind in KINDS}
    assert max(loss[kind] for kind in KINDS if GRAINS[kind] == "fine") >= 0.1, loss
