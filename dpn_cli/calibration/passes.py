"""Forward passes for training: a frozen trunk that teacher and student share, then each one's own way to the logits.

Shapes: B batch, L sequence, A answer tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpn_cli.calibration.teacher import Teacher
from dpn_cli.data.encoding import VISUAL, Example, collate
from dpn_cli.inference.scoring import answer_positions, instruction_columns
from dpn_cli.modeling.renamed import CHECKPOINTING
from dpn_cli.modeling.state import Choice, PyramidState
from dpn_cli.modeling.wrapper import PyramidGenerationMixin

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The attention kernels to train with."""


@dataclass(frozen=True)
class Trunk:
    """A batch after the layers before the first site, without gradients.

    Attributes:
        state: State after the first segment.
        answers: the positions that predict answer tokens, as indices (row [A], column [A]) of [B, L - 1].
        targets: [A], the answer tokens.
        has_labels: [B] bool, whether a row's answers are from the data rather than the teacher's own.
        taught: [A, V] log-probabilities of a teacher that is another model; None where there is none.
    """

    state: PyramidState
    answers: tuple[torch.Tensor, torch.Tensor]
    targets: torch.Tensor
    has_labels: torch.Tensor
    taught: torch.Tensor | None = None

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average values of answer tokens [A] within each row, then over the rows."""
        row = self.answers[0]
        return (values / row.bincount()[row]).sum() / len(row.unique())


def start_batch(model: PyramidGenerationMixin, batch: dict[str, torch.Tensor]) -> PyramidState:
    """Return a collated batch, with images or without, before the first layer; routers read before the first label."""
    text_model: Any = model.text_model
    if visual := {name: batch[name] for name in VISUAL if name in batch}:
        embeds, coords, salience = model.model.embed(batch["input_ids"], **visual)
    else:
        embeds, coords, salience = text_model.embed_tokens(batch["input_ids"]), None, None
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return text_model.start(embeds, mask, positions, coords, salience, instruction_columns(batch["labels"]))


def run_trunk(
    model: PyramidGenerationMixin,
    examples: Sequence[Example],
    has_labels: Sequence[bool],
    pad_token_id: int,
    other: Teacher | None = None,
) -> Trunk:
    """Run a batch up to the first site, and all through a teacher that is another model.

    Samples without an image may be among the batch.
    """
    text_model: Any = model.text_model
    batch = collate(examples, pad_token_id, model.device)
    labels = batch["labels"]
    with torch.no_grad():
        state = text_model.run_segment(start_batch(model, batch), 0)
    row, column = answer_positions(labels)
    taught = None if other is None else other.log_probs(examples, model.lm_head.out_features)
    return Trunk(state, (row, column), labels[:, 1:][row, column], torch.tensor(has_labels, device=row.device), taught)


def teacher_logits(model: PyramidGenerationMixin, trunk: Trunk) -> torch.Tensor:
    """Return the logits [A, V] of the model with its pyramid and its adapter off, or another teacher's, in float32."""
    if trunk.taught is not None:
        return trunk.taught
    text_model: Any = model.text_model
    state = trunk.state
    with torch.no_grad(), model.teacher():
        for segment in range(1, len(text_model.segments)):
            state = text_model.run_segment(state, segment)
        return _logits(model, state, trunk)


def student_logits(
    model: PyramidGenerationMixin, trunk: Trunk, choose: Callable[[PyramidState, int], Choice]
) -> torch.Tensor:
    """Return the logits [A, V] of the pyramid, in float32.

    Args:
        model: Model whose trained parameters require gradients.
        trunk: State that all routes of the batch share.
        choose: what a site takes, from the state before it and its number; not asked about a batch without images.
    """
    text_model: Any = model.text_model
    state = trunk.state
    for site in range(len(model.pyramid.sites)):
        if state.coords is not None:
            state = text_model.apply(state, site, choose(state, site))
        state = text_model.run_segment(state, site + 1)
    return _logits(model, state, trunk)


@contextmanager
def training_mode(model: PyramidGenerationMixin, gradient_checkpointing: bool) -> Iterator[None]:
    """Let the layers after the first site recompute their activations, if asked; leave the model as it was.

    Meanwhile cuDNN's attention is left out: with the padding on the left, some of its gradients are NaN (measured on an
    H200 with torch 2.11, in 2 of 150 steps, and in none with the other kernels).
    """
    with sdpa_kernel(KERNELS), _recomputing(model.text_model) if gradient_checkpointing else nullcontext():
        yield


@contextmanager
def _recomputing(text_model: Any) -> Iterator[None]:
    layers = text_model.layers[text_model.segments[0].stop :]
    getattr(text_model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    for layer in layers:
        layer.training = True  # of the layer alone, which checkpoints then; dropout inside of it stays off
    try:
        yield
    finally:
        getattr(text_model, f"{CHECKPOINTING}_disable")()
        for layer in layers:
            layer.training = False


def _logits(model: PyramidGenerationMixin, state: PyramidState, trunk: Trunk) -> torch.Tensor:
    text_model: Any = model.text_model
    return model.lm_head(text_model.finish(state)[:, :-1][trunk.answers]).float()
