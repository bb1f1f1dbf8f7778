"""Greedy answers of a model to many questions."""

from collections.abc import Callable, Sequence
from typing import Any

from dpn_cli.data.encoding import prompts
from dpn_cli.data.samples import Sample
from dpn_cli.modeling.wrapper import PyramidGenerationMixin


def greedy_answers(
    model: PyramidGenerationMixin,
    processor: Any,
    samples: Sequence[Sample],
    batch_size: int,
    answer_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answer what every sample asks, greedily."""
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        answers += generate_texts(model, processor, prompts(batch, processor, model.device), answer_tokens)
        advance(len(batch))
    return answers


def generate_texts(model: PyramidGenerationMixin, processor: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    """Return what a model goes on with after every prompt of an encoded batch, greedily."""
    generated = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=False
    )
    texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
