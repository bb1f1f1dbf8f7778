"""What the teacher's model card says: held-out accuracy per kind, whole and under fixed pooling."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dpn_cli.demo.assembly import prompt
from dpn_cli.demo.pictures import GRID, KINDS, Sample

SITES = (1, 4, 7)
"""The layers at a quarter, a half and three quarters of the depth after which the card pools."""

Rate = tuple[int, int]


@torch.no_grad()
def greedy_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    batch: int = 64,
) -> dict[str, float]:
    """Measure per kind how often greedy decoding gives exactly the answer.

    Args:
        model: The teacher.
        processor: Its processor.
        samples: Pictures with one question each.
        batch: Samples per call of ``generate``.

    Returns:
        Accuracy by kind, as a fraction.
    """
    right = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        inputs = processor(
            images=[sample.image for sample in part],
            text=[prompt(sample.question) for sample in part],
            padding=True,
            return_tensors="pt",
        ).to(model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [text.strip() == sample.answer for text, sample in zip(texts, part, strict=True)]
    return _by_kind(samples, right)


@torch.no_grad()
def pooled_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    route: Sequence[Rate],
) -> dict[str, float]:
    """Measure per kind how often the first answer token is right under a fixed route.

    Args:
        model: The teacher.
        processor: Its processor.
        samples: Pictures with one question each.
        route: Average pooling (rows, columns) of the visual tokens after each layer of ``SITES``.

    Returns:
        Accuracy by kind, as a fraction.
    """
    texts = [prompt(sample.question) for sample in samples]
    lengths = [len(processor.tokenizer(text)["input_ids"]) for text in texts]
    order = sorted(range(len(samples)), key=lambda i: lengths[i])
    right = [False] * len(samples)
    for _, group in groupby(order, key=lambda i: lengths[i]):
        indices = list(group)
        inputs = processor(
            images=[samples[i].image for i in indices], text=[texts[i] for i in indices], return_tensors="pt"
        ).to(model.dtype)
        predicted = _pooled_logits(model, inputs["input_ids"], inputs["pixel_values"], route).argmax(-1)
        for i, token in zip(indices, predicted, strict=True):
            right[i] = processor.decode(token).strip() == samples[i].answer
    return _by_kind(samples, right)


def _pooled_logits(
    model: LlavaForConditionalGeneration, input_ids: Tensor, pixels: Tensor, route: Sequence[Rate]
) -> Tensor:
    language, image = model.model.language_model, input_ids[0] == model.config.image_token_id
    images = model.model.get_image_features(pixels).pooler_output
    hidden = language.embed_tokens(input_ids)
    hidden[:, image] = torch.stack(list(images)).to(hidden)
    positions = torch.arange(hidden.shape[1], dtype=hidden.dtype)
    start, shape = int(image.nonzero()[0]), (GRID, GRID)
    for index, layer in enumerate(language.layers):
        rotary = language.rotary_emb(hidden, positions[None])
        hidden = layer(hidden, attention_mask=None, position_ids=positions[None], position_embeddings=rotary)
        if index in SITES:
            rate = route[SITES.index(index)]
            end = start + shape[0] * shape[1]
            visual = _pool(hidden[:, start:end].transpose(1, 2).unflatten(2, shape), rate)
            places = _pool(positions[start:end].view(1, 1, *shape), rate)
            shape = (visual.shape[2], visual.shape[3])
            hidden = torch.cat([hidden[:, :start], visual.flatten(2).transpose(1, 2), hidden[:, end:]], dim=1)
            positions = torch.cat([positions[:start], places.flatten(), positions[end:]])
    logits: Tensor = model.lm_head(language.norm(hidden[:, -1]))
    return logits


def _pool(grid: Tensor, rate: Rate) -> Tensor:
    return avg_pool2d(grid, rate, ceil_mode=True, count_include_pad=False)


def _by_kind(samples: Sequence[Sample], right: Sequence[bool]) -> dict[str, float]:
    counts = {kind: [r for s, r in zip(samples, right, strict=True) if s.kind == kind] for kind in KINDS}
    return {kind: sum(hits) / len(hits) for kind, hits in counts.items() if hits}
