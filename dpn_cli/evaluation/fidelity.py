"""Greedy answers of the pyramid beside its teacher's, on samples whose answers are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpn_cli.calibration.cases import generate_texts
from dpn_cli.calibration.data import Sample
from dpn_cli.calibration.encoding import prompts
from dpn_cli.cost import flops_fraction, tokens_per_layer
from dpn_cli.modeling.pyramid_config import Grid, Route
from dpn_cli.modeling.wrapper import PyramidGenerationMixin


@dataclass(frozen=True)
class Answered:
    """One sample, answered twice.

    Attributes:
        kind: the sample's group.
        expected: the label, or None.
        teacher: what the model answers with its pyramid off.
        student: what it answers with its pyramid on.
        route: that the student took.
        fraction: FLOPs of the student's prefill, as a fraction of the teacher's.
        visual_tokens: mean over the decoder's layers.
    """

    kind: str
    expected: str | None
    teacher: str
    student: str
    route: Route
    fraction: float
    visual_tokens: float


@dataclass(frozen=True)
class Fidelity:
    """Means over a group of samples; the accuracies count exact matches, spelling aside.

    Attributes:
        count: samples.
        teacher_accuracy: of the unpooled model.
        student_accuracy: of the pyramid.
        agreement: share of samples on which both give the same answer.
        fraction: FLOPs of the prefill.
        visual_tokens: per layer.
    """

    count: int
    teacher_accuracy: float
    student_accuracy: float
    agreement: float
    fraction: float
    visual_tokens: float

    @classmethod
    def of(cls, answers: Sequence[Answered]) -> "Fidelity":
        """Average over a group of at least one sample."""
        count = len(answers)
        return cls(
            count=count,
            teacher_accuracy=sum(_matches(a.teacher, a.expected) for a in answers) / count,
            student_accuracy=sum(_matches(a.student, a.expected) for a in answers) / count,
            agreement=sum(_matches(a.student, a.teacher) for a in answers) / count,
            fraction=sum(a.fraction for a in answers) / count,
            visual_tokens=sum(a.visual_tokens for a in answers) / count,
        )


def by_kind(answers: Sequence[Answered]) -> dict[str, Fidelity]:
    """Return the means of every kind, in order of appearance."""
    kinds = dict.fromkeys(a.kind for a in answers)
    return {kind: Fidelity.of([a for a in answers if a.kind == kind]) for kind in kinds}


def compare_answers(
    model: PyramidGenerationMixin,
    processor: Any,
    samples: Sequence[Sample],
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Answered]:
    """Let the teacher and the pyramid answer the first question of every sample.

    Args:
        model: at the budget or route to be judged.
        processor: of its checkpoint.
        samples: each with at least one image.
        batch_size: samples per forward pass.
        max_new_tokens: per answer.
        advance: called with the number of samples done after every batch.
    """
    answers: list[Answered] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        inputs = prompts(batch, processor, model.device)
        student = generate_texts(model, processor, inputs, max_new_tokens)
        routes, grids = model.last_routes, model.last_grids
        with model.teacher():
            teacher = generate_texts(model, processor, inputs, max_new_tokens)
        is_text = (inputs["input_ids"] != model.config.image_token_id) & inputs["attention_mask"].bool()
        for sample, *each in zip(batch, student, teacher, routes, grids, is_text.sum(1).tolist(), strict=True):
            answers.append(_answered(model, sample, *each))
        advance(len(batch))
    return answers


def _answered(
    model: PyramidGenerationMixin,
    sample: Sample,
    student: str,
    teacher: str,
    route: Route,
    grids: tuple[Grid, ...],
    text_tokens: int,
) -> Answered:
    pyramid, shape = model.pyramid, model.model.language_model.shape
    return Answered(
        kind=sample.kind or "all",
        expected=sample.turns[0].answer,
        teacher=teacher,
        student=student,
        route=route,
        fraction=flops_fraction(shape, pyramid, route, grids, text_tokens),
        visual_tokens=sum(tokens_per_layer(shape, pyramid, route, grids, text_tokens=0)) / shape.num_layers,
    )


def _matches(answer: str, expected: str | None) -> bool:
    return expected is not None and answer.strip().strip(".").lower() == expected.strip().strip(".").lower()
