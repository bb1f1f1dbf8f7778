"""Greedy answers to a batch of questions, generated only where no forward pass has shown them."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from dpn_cli.data.encoding import collate_prompts, encode_prompt
from dpn_cli.data.samples import Sample
from dpn_cli.inference.generation import forced_texts, generate_texts
from dpn_cli.modeling.wrapper import PyramidGenerationMixin


class AskedBatch:
    """What every sample of a batch asks; its prompts are encoded once, and only if an answer has to be generated."""

    def __init__(
        self, model: PyramidGenerationMixin, processor: Any, samples: Sequence[Sample], answer_tokens: int
    ) -> None:
        """Hold the samples, and how they are answered: with at most so many tokens."""
        self.model = model
        self.processor = processor
        self.samples = samples
        self.answer_tokens = answer_tokens
        self._prompt = cache(lambda row: encode_prompt(samples[row], processor))

    def generated(self, rows: Sequence[int]) -> dict[int, str]:
        """Return the answers to some samples, by row, as the model generates them the way it is set."""
        if not rows:
            return {}
        inputs = collate_prompts(list(map(self._prompt, rows)), self.processor, self.model.device)
        return dict(zip(rows, generate_texts(self.model, self.processor, inputs, self.answer_tokens), strict=True))

    def shown(self, labels: torch.Tensor, likely: torch.Tensor) -> dict[int, str]:
        """Return the answers that a forward pass along the labels has shown, by row.

        Args:
            labels: [B, L]; where samples have several turns, they may be of others than what is asked.
            likely: [A], the most likely tokens that the pass found.
        """
        if any(len(sample.turns) > 1 for sample in self.samples):
            return {}
        return forced_texts(self.model, self.processor.tokenizer, labels, likely, self.answer_tokens)

    def completed(self, known: dict[int, str]) -> list[str]:
        """Return all answers: those that are known by row, and the others generated."""
        answers = known | self.generated([row for row in range(len(self.samples)) if row not in known])
        return [answers[row] for row in range(len(self.samples))]
