"""From conversations to batches of token ids, labels and pixels.

Shapes: B batch, L sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, overload

import torch
from PIL import Image

from dpn_cli.checkpoint.layout import LlavaLayout
from dpn_cli.data.faults import RowError
from dpn_cli.data.rendering import adds_special, chat_prompt, pieces_of
from dpn_cli.data.samples import Sample
from dpn_cli.errors import DataError
from dpn_cli.modeling.visual import GRID_INPUTS
from dpn_cli.pyramid.experts import Grid, num_tokens

IGNORED = -100  # the label of tokens that are not part of an answer
VISUAL = ("pixel_values", *GRID_INPUTS)  # what the processors of all families return for images


@dataclass(frozen=True)
class Example:
    """An encoded sample.

    Attributes:
        input_ids: token ids, [L].
        labels: Target token ids, [L].
        visual: what the processor makes of the images, by name: pixels [images, 3, H, W] or, in tiles,
            [images, tiles, 3, H, W] with the sizes of the images; empty without images.
        name: Name of the sample in messages.
        sample: the sample that was encoded; None where there is none.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    visual: Mapping[str, torch.Tensor]
    name: str = "a sample"
    sample: Sample | None = None

    @property
    def origin(self) -> Sample:
        """The sample that was encoded.

        Raises:
            ValueError: if there is none.
        """
        if self.sample is None:
            raise ValueError(f"{self.name} was not encoded from a sample")
        return self.sample


def encode(sample: Sample, processor: Any, answer_tokens: int) -> Example:
    """Encode an answered conversation; answers and their end-of-sequence tokens are labels.

    The pieces are tokenised apart and then joined, so that labels are exact by construction. Answers before the last
    image are context and no labels: a router decides when it has seen all images.

    Args:
        sample: a conversation whose every turn has an answer.
        processor: the checkpoint's processor.
        answer_tokens: the most tokens of a labelled answer; what follows a shortened answer is left out.

    Raises:
        DataError: if the chat template does not render turns one after another, or an image cannot be read.
    """
    if any(turn.answer is None for turn in sample.turns):
        raise ValueError(f"sample {sample.id} has an unanswered turn")
    pieces = list(pieces_of(sample, processor, answer_tokens))
    images = sample.open_images()[: sum(piece.images for piece in pieces)]
    visual = _visual(images, processor) if images else {}
    counts = (processor.replace_image_token(visual, i).count(processor.image_token) for i in range(len(images)))
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        tokens: list[int] = []
        for token in piece.tokens:
            tokens += [token] * (next(counts) if piece.images and token == processor.image_token_id else 1)
        ids += tokens
        labels += tokens if piece.labelled else [IGNORED] * len(tokens)
    name = f"row {sample.row}" if sample.row else f"sample {sample.id}"
    return Example(torch.tensor(ids), torch.tensor(labels), visual, name, sample)


class Encoded(Sequence[Example]):
    """Samples that are encoded whenever they are asked for, so that their pixels are never all in memory."""

    def __init__(self, samples: Sequence[Sample], processor: Any, answer_tokens: int) -> None:
        self.samples = samples
        self.processor = processor
        self.answer_tokens = answer_tokens

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "Encoded": ...

    def __getitem__(self, index: int | slice) -> "Example | Encoded":
        """Encode one sample, or return some that are not encoded yet."""
        if isinstance(index, slice):
            return Encoded(self.samples[index], self.processor, self.answer_tokens)
        return encode(self.samples[index], self.processor, self.answer_tokens)


def _visual(images: Sequence[Image.Image], processor: Any) -> dict[str, torch.Tensor]:
    """Return what the processor makes of the images of one sample, whose number may decide how they are cut."""
    text = processor.image_token * len(images)
    inputs = processor(text=text, images=[images], add_special_tokens=False, return_tensors="pt")
    return {name: inputs[name] for name in VISUAL if name in inputs}


def token_limit(processor: Any, layout: LlavaLayout, max_tokens: int, answer_tokens: int) -> Callable[[Sample], None]:
    """Return a check that refuses samples of more tokens than the model takes, for `load_data`.

    Args:
        processor: the checkpoint's processor.
        layout: the checkpoint's layout.
        max_tokens: positions of the language model.
        answer_tokens: the most tokens of an answer, as in `encode`; as many are left free for an answer to come.
    """

    def check(sample: Sample) -> None:
        try:
            pieces = list(pieces_of(sample, processor, answer_tokens))
        except DataError as error:
            raise RowError("chat template", str(error)) from None
        if any(piece.tokens.count(processor.image_token_id) != piece.images for piece in pieces):
            shown = sum(piece.tokens.count(processor.image_token_id) for piece in pieces)
            raise RowError("image tokens", f"in its text: {shown}, images of the row: {len(sample.images)}")
        visual = num_tokens(expected_grids(sample, layout))
        total = sum(len(piece.tokens) - piece.images for piece in pieces) + visual
        total += answer_tokens if sample.turns[-1].answer is None else 0
        if total > max_tokens:
            raise RowError("too long", f"{total} tokens with its images, but the model takes {max_tokens}")

    return check


def prompt_tokens(sample: Sample, processor: Any, answer_tokens: int) -> int:
    """Return the text tokens before the first answer that `encode` labels: those that a router decides after."""
    pieces = takewhile(lambda piece: not piece.labelled, pieces_of(sample, processor, answer_tokens))
    return sum(len(piece.tokens) - piece.images for piece in pieces)


def answer_ids(sample: Sample, processor: Any, answer_tokens: int) -> list[int]:
    """Return the tokens that `encode` labels."""
    return [token for piece in pieces_of(sample, processor, answer_tokens) if piece.labelled for token in piece.tokens]


def expected_grids(sample: Sample, layout: LlavaLayout) -> tuple[Grid, ...]:
    """Return the visual grids of a sample without decoding its images."""
    sizes = sample.image_sizes() if layout.tiling else [(1, 1)] * len(sample.images)  # else they do not matter
    return layout.image_grids(sizes)


def collate(examples: Sequence[Example], pad_token_id: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Pad examples on the left into one batch of `input_ids`, `labels`, `attention_mask` and what is visual."""
    longest = max(len(example.input_ids) for example in examples)

    def pad(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=value) for row in rows])

    batch = {
        "input_ids": pad([e.input_ids for e in examples], pad_token_id),
        "labels": pad([e.labels for e in examples], IGNORED),
        "attention_mask": pad([torch.ones_like(e.input_ids) for e in examples], 0),
    }
    for name in VISUAL:
        if tensors := [example.visual[name] for example in examples if name in example.visual]:
            batch[name] = _cat(tensors)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join what the images of several samples are, with empty tiles where one has fewer than another."""
    if tensors[0].ndim == 5:
        most = max(tensor.shape[1] for tensor in tensors)
        tensors = [torch.nn.functional.pad(tensor, (*[0] * 7, most - tensor.shape[1])) for tensor in tensors]
    return torch.cat(list(tensors))


def prompts(samples: Sequence[Sample], processor: Any, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Encode for `generate` what every sample asks, the unanswered question or else the first: padded on the left."""
    return collate_prompts([encode_prompt(sample, processor) for sample in samples], processor, device)


def encode_prompt(sample: Sample, processor: Any) -> Example:
    """Encode what a sample asks; only it has the pixels of its files in memory."""
    text, images = chat_prompt(processor, sample, sample.asked), sample.open_images(sample.asked)
    special = adds_special(processor, text)
    inputs = processor(text=text, images=[images] if images else None, add_special_tokens=special, return_tensors="pt")
    [ids] = inputs["input_ids"]
    return Example(ids, ids, {name: inputs[name] for name in VISUAL if name in inputs})


def collate_prompts(examples: Sequence[Example], processor: Any, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Pad encoded prompts on the left into one batch."""
    batch = collate(examples, processor.tokenizer.pad_token_id, device)
    del batch["labels"]
    return batch
