"""From the results of samples to figures: means with their 95% intervals, and paired comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from dpn_cli.data.metrics import METRICS
from dpn_cli.evaluation.judging import SampleResult
from dpn_cli.intervals import Estimate, bootstrap_mean, mcnemar

RIGHT = 0.5  # a score from here on counts as a right answer


@dataclass(frozen=True)
class Question:
    """What figures of a sample need, besides results.

    Attributes:
        kind: the sample's group.
        label: the answer in the data, or None.
        teacher: the teacher's answer.
    """

    kind: str
    label: str | None
    teacher: str


@dataclass(frozen=True)
class Accuracy:
    """How well the labels are met.

    Attributes:
        count: number of samples with a label.
        score: mean score of the method.
        teacher: mean score of the teacher.
        change: the method's score less the teacher's, sample by sample.
        mcnemar: p-value of both being right equally often.
    """

    count: int
    score: Estimate
    teacher: float
    change: Estimate
    mcnemar: float

    @classmethod
    def of(cls, results: Sequence[SampleResult], questions: Sequence[Question], metric: str) -> "Accuracy | None":
        """Score the answers to labelled questions; None if there are none."""
        score = METRICS[metric].score
        pairs = [(r, q) for r, q in zip(results, questions, strict=True) if q.label is not None]
        if not pairs:
            return None
        mine = [score(r.answer, q.label or "") for r, q in pairs]
        theirs = [score(q.teacher, q.label or "") for _, q in pairs]
        return cls(
            count=len(pairs),
            score=bootstrap_mean(mine),
            teacher=fmean(theirs),
            change=bootstrap_mean([a - b for a, b in zip(mine, theirs, strict=True)]),
            mcnemar=mcnemar([s >= RIGHT for s in mine], [s >= RIGHT for s in theirs]),
        )


@dataclass(frozen=True)
class Figures:
    """What a method reached on a group of samples.

    Attributes:
        count: number of samples.
        fraction: mean FLOPs of the prefill, as a fraction of the original's.
        fraction_spread: standard deviation of that fraction over the samples.
        visual_tokens: visual tokens, the mean over samples and layers.
        distortion: KL from the teacher, nats per answer token.
        agreement: share of answer tokens whose most likely token is the teacher's.
        same_answer: share of greedy answers that are the teacher's, word for word.
        accuracy: accuracy by the labels; None if there are none.
    """

    count: int
    fraction: float
    fraction_spread: float
    visual_tokens: float
    distortion: Estimate
    agreement: Estimate
    same_answer: Estimate
    accuracy: Accuracy | None

    @classmethod
    def of(cls, results: Sequence[SampleResult], questions: Sequence[Question], metric: str) -> "Figures":
        """Average over at least one sample."""
        same = [float(r.answer == q.teacher) for r, q in zip(results, questions, strict=True)]
        return cls(
            count=len(results),
            fraction=fmean(r.fraction for r in results),
            fraction_spread=pstdev(r.fraction for r in results),
            visual_tokens=fmean(r.visual_tokens for r in results),
            distortion=bootstrap_mean([r.distortion for r in results]),
            agreement=bootstrap_mean([r.agreement for r in results]),
            same_answer=bootstrap_mean(same),
            accuracy=Accuracy.of(results, questions, metric),
        )


def by_kind(results: Sequence[SampleResult], questions: Sequence[Question], metric: str) -> dict[str, Figures]:
    """Return the figures of every kind of question, in order of appearance."""
    rows: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        rows.setdefault(question.kind, []).append(i)
    return {
        kind: Figures.of([results[i] for i in chosen], [questions[i] for i in chosen], metric)
        for kind, chosen in rows.items()
    }
