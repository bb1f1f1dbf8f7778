"""What the held-out samples are answered, by both models: the samples that came out worst first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpn_cli.calibration.rollout import RouteTable
from dpn_cli.calibration.teacher import Teacher
from dpn_cli.data.samples import Sample
from dpn_cli.inference.generation import greedy_answers
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import Route

ANSWERED = 128  # held-out samples that are answered, at most


@dataclass(frozen=True)
class Measured:
    """A held-out sample on the route that it takes.

    Attributes:
        index: Position of the sample among the held-out ones.
        distortion: KL from the teacher, nats per answer token.
        agreement: fraction of answer tokens on which the most likely token is the teacher's.
        fraction: FLOPs of its prefill, as a fraction of the original's.
        route: Route that the sample takes.
    """

    index: int
    distortion: float
    agreement: float
    fraction: float
    route: Route


@dataclass(frozen=True)
class Case:
    """A sample, how it fared and what is answered.

    Attributes:
        sample: The sample as it was read.
        measured: What the sample's own route does to it.
        teacher: greedy answer of the teacher.
        student: greedy answer at the budget.
    """

    sample: Sample
    measured: Measured
    teacher: str
    student: str

    @property
    def question(self) -> str:
        """What is asked."""
        return self.sample.turns[self.sample.asked].question

    @property
    def label(self) -> str | None:
        """The answer in the data, if there is one."""
        return self.sample.turns[self.sample.asked].answer

    @property
    def has_changed(self) -> bool:
        """Whether the two answers differ, in whatever way."""
        return self.student != self.teacher

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the images."""
        return {
            "id": self.sample.id,
            "question": self.question,
            "label": self.label,
            "teacher": self.teacher,
            "student": self.student,
            "distortion": self.measured.distortion,
            "agreement": self.measured.agreement,
            "fraction": self.measured.fraction,
            "route": list(self.measured.route),
        }


def ranked(held: RouteTable, taken: torch.Tensor) -> list[Measured]:
    """Return the samples to answer, the one with the largest distortion first: all, or as many evenly spread ones.

    Args:
        held: the measurements.
        taken: the index of the route that each sample takes, [N].
    """
    rows = torch.arange(len(taken))
    distortion, agreement, fraction = (t[rows, taken] for t in (held.distortion, held.agreement, held.fraction))
    order = distortion.argsort(descending=True, stable=True)
    spread = torch.linspace(0, len(order) - 1, min(len(order), ANSWERED)).round().long()
    return [
        Measured(i, distortion[i].item(), agreement[i].item(), fraction[i].item(), held.tree.routes[int(taken[i])])
        for i in order[spread].tolist()
    ]


def answer_both(
    model: PyramidGenerationMixin,
    processor: Any,
    teacher: Teacher,
    measured: Sequence[Measured],
    samples: Sequence[Sample],
    batch_size: int,
    advance: Callable[[int], None],
) -> list[Case]:
    """Let student and teacher answer some of the held-out samples.

    Args:
        model: Model set to the budget.
        processor: The checkpoint's processor.
        teacher: the other one that answers, with as many tokens.
        measured: Held-out samples to answer.
        samples: all held-out ones, as they were read.
        batch_size: samples per forward pass.
        advance: called with the number of samples done.
    """
    shown = [samples[each.index] for each in measured]
    student = greedy_answers(model, processor, shown, batch_size, teacher.answer_tokens)
    taught = teacher.answers(shown, batch_size, advance)
    return [Case(*parts) for parts in zip(shown, measured, taught, student, strict=True)]
