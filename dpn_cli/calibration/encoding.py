"""From conversations to batches of token ids, labels and pixels.

Shapes: B batch, L sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpn_cli.calibration.data import Sample
from dpn_cli.errors import DataError

IGNORED = -100  # the label of tokens that are not part of an answer


@dataclass(frozen=True)
class Example:
    """An encoded sample: ids [L], labels [L], pixels [images, 3, H, W]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor


def chat_prompt(processor: Any, sample: Sample, turn: int) -> str:
    """Render a conversation up to one turn's question and the cue for its answer."""
    messages: list[dict[str, Any]] = []
    for i, each in enumerate(sample.turns[: turn + 1]):
        content = [{"type": "image"}] * (len(sample.images) if i == 0 else 0)
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": each.question}]})
        if i < turn:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": each.answer}]})
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def encode(sample: Sample, processor: Any, answer_tokens: int) -> Example:
    """Encode an answered conversation; every answer and its end-of-sequence token are labels.

    The pieces are tokenised apart and then joined, so that labels are exact by construction.

    Args:
        sample: every turn of it answered.
        processor: the checkpoint's.
        answer_tokens: at most so many per answer; what follows a shortened answer is left out.

    Raises:
        DataError: if the chat template does not render turns one after another, or an image cannot be read.
    """
    tokenizer = processor.tokenizer
    text = chat_prompt(processor, sample, 0)
    inputs = processor(text=text, images=sample.open_images(), return_tensors="pt")
    ids: list[int] = inputs["input_ids"][0].tolist()
    labels = [IGNORED] * len(ids)
    for i, turn in enumerate(sample.turns):
        if turn.answer is None:
            raise ValueError(f"sample {sample.id} has an unanswered turn")
        answer = tokenizer.encode(f" {turn.answer}", add_special_tokens=False)
        shortened = len(answer) > answer_tokens
        piece = answer[:answer_tokens] if shortened else [*answer, tokenizer.eos_token_id]
        ids += piece
        labels += piece
        if shortened or i + 1 == len(sample.turns):
            break
        previous, text = f"{text} {turn.answer}", chat_prompt(processor, sample, i + 1)
        if not text.startswith(previous):
            raise DataError(f"sample {sample.id}: the chat template does not keep earlier turns as they were")
        question = tokenizer.encode(text.removeprefix(previous), add_special_tokens=False)
        ids += question
        labels += [IGNORED] * len(question)
    return Example(torch.tensor(ids), torch.tensor(labels), inputs["pixel_values"])


def collate(examples: Sequence[Example], pad_token_id: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Pad examples on the left into one batch of `input_ids`, `labels`, `attention_mask` and `pixel_values`."""
    longest = max(len(example.input_ids) for example in examples)

    def pad(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=value) for row in rows])

    batch = {
        "input_ids": pad([e.input_ids for e in examples], pad_token_id),
        "labels": pad([e.labels for e in examples], IGNORED),
        "attention_mask": pad([torch.ones_like(e.input_ids) for e in examples], 0),
        "pixel_values": torch.cat([e.pixel_values for e in examples]),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def prompts(samples: Sequence[Sample], processor: Any, device: torch.device | str = "cpu") -> Any:
    """Encode the first questions of samples for `generate`: padded on the left."""
    return processor(
        text=[chat_prompt(processor, sample, 0) for sample in samples],
        images=[image for sample in samples for image in sample.open_images()],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    ).to(device)
