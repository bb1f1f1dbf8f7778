"""From conversations to batches of token ids, labels and pixels.

Shapes: B batch, L sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from dpn_cli.calibration.data import RowError, Sample
from dpn_cli.errors import DataError

IGNORED = -100  # the label of tokens that are not part of an answer
NO_PIXELS = torch.zeros(0, 3, 1, 1)


@dataclass(frozen=True)
class Example:
    """An encoded sample: ids [L], labels [L], pixels [images, 3, H, W] (or `NO_PIXELS`), a name for messages."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor
    name: str = "a sample"


def chat_prompt(processor: Any, sample: Sample, turn: int) -> str:
    """Render a conversation up to one turn's question and the cue for its answer.

    A system message that the chat template refuses or leaves out goes before the first question.

    Raises:
        DataError: if the template cannot render the conversation.
    """
    messages: list[dict[str, Any]] = []
    for i, each in enumerate(sample.turns[: turn + 1]):
        content = [{"type": "image"}] * each.images
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": each.question}]})
        if i < turn:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": each.answer}]})
    if sample.system:
        system = {"role": "system", "content": [{"type": "text", "text": sample.system}]}
        with suppress(TemplateError):
            text = processor.apply_chat_template([system, *messages], add_generation_prompt=True)
            if sample.system in text:
                return text
        messages[0]["content"][-1]["text"] = f"{sample.system}\n{sample.turns[0].question}"
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(f"sample {sample.id}: the chat template refuses it: {error}") from None


def encode(sample: Sample, processor: Any, answer_tokens: int) -> Example:
    """Encode an answered conversation; answers and their end-of-sequence tokens are labels.

    The pieces are tokenised apart and then joined, so that labels are exact by construction. Answers before the last
    image are context and no labels: a router decides when it has seen all images.

    Args:
        sample: every turn of it answered.
        processor: the checkpoint's.
        answer_tokens: at most so many per labelled answer; what follows a shortened answer is left out.

    Raises:
        DataError: if the chat template does not render turns one after another, or an image cannot be read.
    """
    if any(turn.answer is None for turn in sample.turns):
        raise ValueError(f"sample {sample.id} has an unanswered turn")
    images = sample.open_images()
    ids: list[int] = []
    labels: list[int] = []
    pixels: list[torch.Tensor] = []
    for piece in _pieces(sample, processor, answer_tokens):
        if piece.images:
            shown, images = images[: piece.images], images[piece.images :]
            inputs = processor(
                text=piece.text, images=shown, add_special_tokens=not ids, return_tensors="pt", padding=False
            )
            tokens = inputs["input_ids"][0].tolist()
            pixels.append(inputs["pixel_values"])
        else:
            tokens = piece.tokens
        ids += tokens
        labels += tokens if piece.labelled else [IGNORED] * len(tokens)
    name = f"row {sample.row}" if sample.row else f"sample {sample.id}"
    return Example(torch.tensor(ids), torch.tensor(labels), torch.cat(pixels) if pixels else NO_PIXELS, name)


def token_limit(processor: Any, max_tokens: int, answer_tokens: int) -> Callable[[Sample], None]:
    """Return a check that refuses samples of more tokens than the model takes, for `load_data`.

    Args:
        processor: the checkpoint's.
        max_tokens: positions of the language model.
        answer_tokens: as for `encode`; also left free for answers to come.
    """
    blank = processor(text=processor.image_token, images=Image.new("RGB", (8, 8)), add_special_tokens=False)
    image_tokens = len(blank["input_ids"][0])

    def check(sample: Sample) -> None:
        try:
            pieces = list(_pieces(sample, processor, answer_tokens))
        except DataError as error:
            raise RowError("chat template", str(error)) from None
        if any(piece.tokens.count(processor.image_token_id) != piece.images for piece in pieces):
            shown = sum(piece.tokens.count(processor.image_token_id) for piece in pieces)
            raise RowError("image tokens", f"its text has {shown} image tokens, the row {len(sample.images)} images")
        total = sum(len(piece.tokens) + piece.images * (image_tokens - 1) for piece in pieces)
        total += answer_tokens if sample.turns[-1].answer is None else 0
        if total > max_tokens:
            raise RowError("over-long", f"{total} tokens with its images, the model takes {max_tokens}")

    return check


def prompt_tokens(sample: Sample, processor: Any, answer_tokens: int) -> int:
    """Return the text tokens before the first answer that `encode` labels: those that a router decides after."""
    pieces = takewhile(lambda piece: not piece.labelled, _pieces(sample, processor, answer_tokens))
    return sum(len(piece.tokens) - piece.images for piece in pieces)


@dataclass(frozen=True)
class _Piece:
    """A stretch of a conversation that is tokenised on its own.

    Attributes:
        text: of a question, or empty.
        tokens: with one placeholder per image.
        images: shown in it.
        labelled: whether the model is to predict it.
    """

    text: str
    tokens: list[int]
    images: int = 0
    labelled: bool = False


def _pieces(sample: Sample, processor: Any, answer_tokens: int) -> Iterator[_Piece]:
    """Yield the questions and answers of a conversation, up to one without an answer or a shortened one."""
    tokenizer = processor.tokenizer
    last_shown = max((i for i, turn in enumerate(sample.turns) if turn.images), default=0)
    before = ""
    for i, turn in enumerate(sample.turns):
        text = chat_prompt(processor, sample, i)
        if not text.startswith(before):
            raise DataError(f"sample {sample.id}: the chat template does not keep earlier turns as they were")
        question = text.removeprefix(before).removeprefix(tokenizer.eos_token if i else "")  # the answer has it
        yield _Piece(question, tokenizer.encode(question, add_special_tokens=i == 0), turn.images)
        if turn.answer is None:
            return
        answer = tokenizer.encode(f" {turn.answer}", add_special_tokens=False)
        labelled = i >= last_shown
        if labelled and len(answer) > answer_tokens:
            yield _Piece("", answer[:answer_tokens], labelled=True)
            return
        yield _Piece("", [*answer, tokenizer.eos_token_id], labelled=labelled)
        before = f"{text} {turn.answer}"


def collate(examples: Sequence[Example], pad_token_id: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Pad examples on the left into one batch of `input_ids`, `labels`, `attention_mask` and any `pixel_values`."""
    longest = max(len(example.input_ids) for example in examples)

    def pad(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=value) for row in rows])

    batch = {
        "input_ids": pad([e.input_ids for e in examples], pad_token_id),
        "labels": pad([e.labels for e in examples], IGNORED),
        "attention_mask": pad([torch.ones_like(e.input_ids) for e in examples], 0),
    }
    if pixels := [e.pixel_values for e in examples if len(e.pixel_values)]:
        batch["pixel_values"] = torch.cat(pixels)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def prompts(samples: Sequence[Sample], processor: Any, device: torch.device | str = "cpu") -> Any:
    """Encode for `generate` what every sample asks, the unanswered question or else the first: padded on the left."""
    return processor(
        text=[chat_prompt(processor, sample, sample.asked) for sample in samples],
        images=[image for sample in samples for image in sample.open_images(sample.asked)] or None,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    ).to(device)
