"""What a user says about an evaluation, apart from the checkpoint and the data."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationOptions:
    """What is compared, on how many samples, and how they are asked.

    Attributes:
        budgets: mean fractions of the prefill FLOPs; empty for what the checkpoint is set to.
        routes: routes to ask too, each the same for all samples, as `parse_route` reads them.
        against: names from `BASELINES` to compare with.
        metric: name from `METRICS`; scores answers by their labels.
        samples: number of samples to draw; None for all.
        seed: random seed for sampling.
        answer_tokens: the most tokens in an answer.
        batch_size: samples per forward pass.
        dtype: dtype to compute in, see `compute_dtype`.
    """

    budgets: Sequence[float] = ()
    routes: Sequence[str] = ()
    against: Sequence[str] = ()
    metric: str = "exact"
    samples: int | None = None
    seed: int = 0
    answer_tokens: int = 32
    batch_size: int = 8
    dtype: str = "auto"
