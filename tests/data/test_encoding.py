"""From conversations to token ids: labels are the answers, prompts are the processor's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dpn_cli.checkpoint.layout import LlavaLayout, open_llava
from dpn_cli.data.encoding import IGNORED, Example, collate, encode, prompts, token_limit
from dpn_cli.data.faults import RowError
from dpn_cli.data.rendering import chat_prompt
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.errors import DataError

RED, BLUE = Image.new("RGB", (50, 40), (200, 30, 30)), Image.new("RGB", (40, 50), (30, 30, 200))
IMAGE_TOKENS = 144


@pytest.fixture(scope="module")
def processor(tiny_llava: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_llava)


@pytest.fixture(scope="module")
def layout(tiny_llava: Path) -> LlavaLayout:
    return open_llava(tiny_llava)[1]


def text_of(processor: Any, tokens: torch.Tensor) -> str:
    text = processor.tokenizer.decode(tokens)
    return text.replace(" ".join(["<image>"] * IMAGE_TOKENS), "[image]")


def labels_of(processor: Any, example: Example) -> str:
    return processor.tokenizer.decode(example.labels[example.labels != IGNORED])


def test_labels_are_the_answers_and_the_prompt_is_the_processors(processor: Any) -> None:
    turns = (Turn("what colour is this ?", "red"), Turn("which shape ?", "blue circle"))
    example = encode(Sample("x", (RED,), turns), processor, answer_tokens=8)
    assert labels_of(processor, example) == "red </s> blue circle </s>"
    labelled = example.labels != IGNORED
    assert (example.input_ids[labelled] == example.labels[labelled]).all()
    prompt = processor(text="USER: <image>\nwhat colour is this ? ASSISTANT:", images=RED, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    assert (example.input_ids[:length] == prompt["input_ids"][0]).all()
    assert (example.visual["pixel_values"] == prompt["pixel_values"]).all()
    rest = processor.tokenizer.decode(example.input_ids[length:])
    assert rest == "red </s> USER : which shape ? ASSISTANT : blue circle </s>"


def test_an_image_of_a_later_turn_stands_there_and_labels_follow_it(processor: Any) -> None:
    turns = (
        Turn("what ?", "red green blue"),
        Turn("which ?", "red", 1),
        Turn("where ?", "top", 1),
        Turn("how ?", "big"),
    )
    example = encode(Sample("x", (RED, BLUE), turns), processor, answer_tokens=2)
    assert text_of(processor, example.input_ids) == (
        "<s> USER : what ? ASSISTANT : red green blue </s> USER : [image] which ? ASSISTANT : red </s> "
        "USER : [image] where ? ASSISTANT : top </s> USER : how ? ASSISTANT : <unk> </s>"
    )
    assert labels_of(processor, example) == "top </s> <unk> </s>"
    expected = processor.image_processor(images=[RED, BLUE], return_tensors="pt")["pixel_values"]
    assert torch.equal(example.visual["pixel_values"], expected)


def test_long_answers_are_shortened_without_an_end(processor: Any) -> None:
    turns = (Turn("what ?", "red green blue yellow"), Turn("what ?", "red"))
    example = encode(Sample("x", (RED,), turns), processor, answer_tokens=2)
    assert labels_of(processor, example) == "red green"
    assert example.labels[-1] != IGNORED, "nothing may follow a shortened answer"


def test_text_only_samples_have_no_pixels(processor: Any) -> None:
    example = encode(Sample("x", (), (Turn("what ?", "red"),)), processor, answer_tokens=8)
    assert text_of(processor, example.input_ids) == "<s> USER : what ? ASSISTANT : red </s>"
    assert "pixel_values" not in collate([example], pad_token_id=3)
    with_image = encode(Sample("x", (RED,), (Turn("what ?", "red"),)), processor, answer_tokens=8)
    assert collate([example, with_image], pad_token_id=3)["pixel_values"].shape == (1, 3, 48, 48)


def test_batches_are_padded_on_the_left(processor: Any) -> None:
    examples = [encode(Sample("x", (RED,) * n, (Turn("what ?", "red"),)), processor, answer_tokens=8) for n in (1, 2)]
    batch = collate(examples, pad_token_id=3)
    gap = len(examples[1].input_ids) - len(examples[0].input_ids)
    assert gap > 0
    assert (batch["attention_mask"][0] == 0).sum() == gap and batch["attention_mask"][0, :gap].sum() == 0
    assert (batch["labels"][0, :gap] == IGNORED).all() and (batch["input_ids"][0, :gap] == 3).all()
    assert batch["pixel_values"].shape[0] == 3


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'][-1]['text'] }} A:{% endif %}{% endfor %}"
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + NO_SYSTEM


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "SYSTEM: say red USER: what ? ASSISTANT:"),
        (NO_SYSTEM, "Q: say red\nwhat ? A:"),
        (REFUSES, "Q: say red\nwhat ? A:"),
    ],
)
def test_a_system_message_is_never_lost(
    processor: Any, monkeypatch: pytest.MonkeyPatch, template: str | None, expected: str
) -> None:
    if template:
        monkeypatch.setattr(processor, "chat_template", template)
    assert chat_prompt(processor, Sample("x", (), (Turn("what ?"),), system="say red"), 0) == expected


ONEVISION = (  # the cue is "assistant" and a newline, an answered turn has a blank between them
    "{% for m in messages %}[{{ m['role'] }} {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ '\n' + part['text'] }}{% endif %}"
    "{% endfor %}]{% endfor %}{% if add_generation_prompt %}[assistant\n{% endif %}"
)


def test_blanks_before_an_answer_are_the_templates_own(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "chat_template", ONEVISION)
    seen: list[str] = []
    tokenise = processor.tokenizer.encode
    monkeypatch.setattr(
        processor.tokenizer, "encode", lambda text, **kwargs: seen.append(text) or tokenise(text, **kwargs)
    )
    encode(Sample("x", (RED,), (Turn("what ?", "red"), Turn("which ?", "blue"))), processor, answer_tokens=8)
    assert seen == [
        "[user <image>\nwhat ?][assistant\n", "red", "][user \nwhich ?][assistant\n", "blue",
    ]  # fmt: skip
    monkeypatch.setattr(processor, "chat_template", ONEVISION.replace("[{{ m['role'] }}", "[{{ loop.revindex }}"))
    with pytest.raises(DataError, match="does not keep earlier turns"):
        encode(Sample("x", (RED,), (Turn("what ?", "red"), Turn("which ?", "blue"))), processor, answer_tokens=8)


LLAMA_3 = (  # begins with the first special token, and ends turns with one of its own
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }} {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}<eot>{% endfor %}{% if add_generation_prompt %}[assistant {% endif %}"
)


@pytest.mark.parametrize("system", ["", "say red"])
def test_special_tokens_that_the_template_writes_stand_once(tiny_llava: Path, system: str) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_llava, chat_template=LLAMA_3)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<eot>"]})
    sample = Sample("x", (RED,), (Turn("what ?", "red"), Turn("which ?", "blue")), system=system)
    messages = [
        *([{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []),
        {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "what ?"}]},
    ]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"]
    assert torch.equal(prompts([replace(sample, turns=sample.turns[:1])], processor)["input_ids"], prompt)
    for role, text in (("assistant", "red"), ("user", "which ?"), ("assistant", "blue")):
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    whole = processor.apply_chat_template(messages, **options)["input_ids"][0]
    example = encode(sample, processor, answer_tokens=8)
    assert torch.equal(example.input_ids, whole)
    assert labels_of(processor, example) == "red <eot> blue <eot>"


def test_a_template_that_refuses_a_conversation_is_named(
    processor: Any, layout: LlavaLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "chat_template", "{{ raise_exception('never') }}")
    sample = Sample("x", (), (Turn("what ?", "red"),))
    with pytest.raises(DataError, match="sample x: the chat template rejects it: never"):
        encode(sample, processor, 8)
    with pytest.raises(RowError, match="never"):
        monkeypatch.undo()
        check = token_limit(processor, layout, 300, 8)
        monkeypatch.setattr(processor, "chat_template", "{{ raise_exception('never') }}")
        check(sample)


@pytest.mark.parametrize("answer", ["red green blue", None])
def test_the_token_limit_counts_what_is_encoded(processor: Any, layout: LlavaLayout, answer: str | None) -> None:
    sample = Sample("x", (RED, BLUE), (Turn("what ?", "red", 1), Turn("which ?", answer, 1)), system="say")
    length = len(encode(sample.answered("red green blue") if answer is None else sample, processor, 2).input_ids)
    token_limit(processor, layout, length, 2)(sample)
    with pytest.raises(RowError, match=f"{length} tokens with its images, but the model takes {length - 1}"):
        token_limit(processor, layout, length - 1, 2)(sample)


def test_text_that_reads_as_an_image_token_is_refused(processor: Any, layout: LlavaLayout) -> None:
    check = token_limit(processor, layout, 2048, 8)
    for sample in (
        Sample("x", (RED,), (Turn("what is <image> ?", "red"),)),
        Sample("x", (RED,), (Turn("what ?", "an <image>"),)),
    ):
        with pytest.raises(RowError, match="in its text: 2, images of the row: 1"):
            check(sample)


def test_prompts_ask_what_is_unanswered(processor: Any) -> None:
    answered = Sample("a", (RED,), (Turn("what ?", "red"), Turn("which ?", "blue")))
    waiting = Sample("b", (RED, BLUE), (Turn("what ?", "red", 1), Turn("which ?", None, 1)))
    batch = prompts([answered, waiting], processor)
    first, second = (
        text_of(processor, ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    assert first == "<s> USER : [image] what ? ASSISTANT :"
    assert second == "<s> USER : [image] what ? ASSISTANT : red USER : [image] which ? ASSISTANT :"
    assert len(batch["pixel_values"]) == 3


def test_a_text_that_the_tokenizer_gives_up_on_is_a_fault_of_its_row(processor: Any, layout: LlavaLayout) -> None:
    from tokenizers import Regex, pre_tokenizers

    backend = processor.tokenizer.backend_tokenizer
    before, hopeless = backend.pre_tokenizer, pre_tokenizers.Split(Regex("(b+)+c"), "isolated")
    try:
        backend.pre_tokenizer = hopeless
        with pytest.raises(RowError, match=r"sample 1 cannot be encoded by the tokenizer: .*retry-limit"):
            token_limit(processor, layout, 100, 1)(Sample("1", (), (Turn("b" * 60, "red"),)))
    finally:
        backend.pre_tokenizer = before
