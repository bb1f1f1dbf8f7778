"""The teacher: the model that a calibration keeps to, in its answers and in the probabilities of their tokens.

It is the calibrated model itself without its pyramid, or another one with the same tokenizer. That one encodes prompts
in its own way, with its own size of images and chat template: only the tokens of the answers are the same.

Shapes: A answer tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpn_cli.data.encoding import Example, collate, encode
from dpn_cli.data.samples import Sample
from dpn_cli.inference.generation import greedy_answers
from dpn_cli.inference.scoring import answer_log_probs
from dpn_cli.modeling.wrapper import PyramidGenerationMixin


@dataclass(frozen=True)
class Teacher:
    """A model that answers without its pyramid and its adapter.

    Attributes:
        model: Model, in eval mode.
        processor: Processor of its checkpoint.
        answer_tokens: Largest number of tokens per answer.
        name: Name of its checkpoint; None where it is the calibrated model itself.
    """

    model: PyramidGenerationMixin
    processor: Any
    answer_tokens: int
    name: str | None = None

    def answers(
        self, samples: Sequence[Sample], batch_size: int, advance: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """Answer what every sample asks, greedily."""
        with self.model.teacher():
            return greedy_answers(self.model, self.processor, samples, batch_size, self.answer_tokens, advance)

    @torch.no_grad()
    def log_probs(self, examples: Sequence[Example], vocab_size: int) -> torch.Tensor:
        """Return the log-probabilities [A, V] of the answer tokens of samples that another model's processor encoded.

        Args:
            examples: Encoded samples.
            vocab_size: Vocabulary of the other model. Embeddings are padded to various sizes: V is the smaller one.
        """
        own = [encode(example.origin, self.processor, self.answer_tokens) for example in examples]
        batch = collate(own, self.processor.tokenizer.pad_token_id, self.model.device)
        with self.model.teacher():
            return answer_log_probs(self.model, batch)[:, :vocab_size].log_softmax(-1)
