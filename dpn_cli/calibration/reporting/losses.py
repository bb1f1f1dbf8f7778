"""What is lost: how many answers changed, and how many are right by the labels, per kind of question."""

from collections.abc import Sequence
from dataclasses import dataclass

from dpn_cli.calibration.cases import Case
from dpn_cli.data.metrics import METRICS

METRIC = "exact"
ALL = "all"


@dataclass(frozen=True)
class Loss:
    """The answers of a group of samples.

    Attributes:
        kind: Kind that the samples have in common.
        count: number of samples.
        changed: number of samples whose answer is not, word for word, the original's.
        labelled: number of samples with a label.
        original: share of those that the original answers right.
        calibrated: share of those that the calibrated model answers right.
    """

    kind: str
    count: int
    changed: int
    labelled: int
    original: float
    calibrated: float

    @classmethod
    def of(cls, kind: str, cases: Sequence[Case]) -> "Loss":
        """Sum up some samples; without labels nothing is right."""
        score = METRICS[METRIC].score
        labelled = [(case, case.label) for case in cases if case.label is not None]
        count = max(len(labelled), 1)
        return cls(
            kind=kind,
            count=len(cases),
            changed=sum(case.has_changed for case in cases),
            labelled=len(labelled),
            original=sum(score(case.teacher, label) for case, label in labelled) / count,
            calibrated=sum(score(case.student, label) for case, label in labelled) / count,
        )


def losses(cases: Sequence[Case]) -> list[Loss]:
    """Return the losses of every kind, those with the most changed answers first, and of all samples last."""
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.sample.kind or "", []).append(case)
    found = [Loss.of(kind or "without a kind", each) for kind, each in kinds.items()] if len(kinds) > 1 else []
    return [*sorted(found, key=lambda loss: -loss.changed / loss.count), Loss.of(ALL, cases)]
