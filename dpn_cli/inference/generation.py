"""Greedy answers of a model to many questions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpn_cli.data.encoding import IGNORED, prompts
from dpn_cli.data.samples import Sample
from dpn_cli.modeling.wrapper import PyramidGenerationMixin

PLAIN = {
    "_from_model_config", "bos_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens",
    "output_attentions", "output_hidden_states", "pad_token_id", "temperature", "top_k", "top_p",
    "transformers_version", "use_cache",
}  # fmt: skip
"""Settings of generation that the tokens of a greedy answer do not depend on."""


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


def forced_texts(
    model: PyramidGenerationMixin,
    tokenizer: Any,
    labels: torch.Tensor,
    most_likely: torch.Tensor,
    max_new_tokens: int,
) -> dict[int, str]:
    """Return by row the answers that a forward pass along them has shown to be what the model generates greedily.

    Those are the ones whose every token is the most likely one after those before it.

    Args:
        model: Model, with the generation config that it generates with.
        tokenizer: Tokenizer of the labels.
        labels: [B, L], one answer per row.
        most_likely: [A], the most likely token at every position that predicts a label.
        max_new_tokens: the most tokens that it generates.
    """
    labels, most_likely, config = labels.cpu(), most_likely.cpu(), model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.to_diff_dict().keys() - PLAIN:
        return {}
    answers = [row[row != IGNORED] for row in labels]
    found = most_likely.split([len(answer) for answer in answers])
    cut = [(answer[:max_new_tokens], likely[:max_new_tokens]) for answer, likely in zip(answers, found, strict=True)]
    agreed = {
        row: answer
        for row, (answer, likely) in enumerate(cut)
        if answer.equal(likely) and (len(answer) == max_new_tokens or int(answer[-1]) in ends)
    }
    return {row: tokenizer.decode(answer, skip_special_tokens=True).strip() for row, answer in agreed.items()}
