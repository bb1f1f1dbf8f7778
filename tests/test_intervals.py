"""Intervals and tests: known cases, and their coverage by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_cli.intervals import Estimate, bootstrap_mean, mcnemar, wilson_interval


@pytest.mark.parametrize("value", [0.25, 0.0])
def test_bootstrap_of_a_constant_is_a_point(value: float) -> None:
    assert bootstrap_mean([value] * 7) == Estimate(value, value, value)


def test_bootstrap_is_close_to_the_normal_interval_of_many_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 5000)
    estimate = bootstrap_mean(values.tolist())
    half = 1.96 * values.std() / 5000**0.5
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_bootstrap_in_pieces_equals_bootstrap_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).exponential(size=40).tolist()
    at_once = bootstrap_mean(values)
    monkeypatch.setattr("dpn_cli.intervals._DRAWN_AT_ONCE", 130)
    assert bootstrap_mean(values) == at_once


@pytest.mark.slow
@pytest.mark.parametrize("law", ["exponential", "binary", "differences"])
def test_the_bootstrap_interval_covers_the_mean(law: str) -> None:
    """In 95 of 100 repetitions; the percentile interval is known to fall a little short on skewed data."""
    rng = np.random.default_rng(0)
    draw, mean = {
        "exponential": (lambda: rng.exponential(size=100), 1.0),
        "binary": (lambda: (rng.random(100) < 0.85).astype(float), 0.85),
        "differences": (lambda: rng.exponential(1.0, 100) - rng.exponential(0.5, 100), 0.5),
    }[law]
    repetitions = 2000
    covered = 0
    for _ in range(repetitions):
        estimate = bootstrap_mean(draw().tolist())
        covered += estimate.low <= mean <= estimate.high
    assert 0.92 <= covered / repetitions <= 0.97


def test_mcnemar_known_values() -> None:
    """Values of the binomial distribution: 2·P(X ≤ 2) for n = 12, and 2·P(X ≤ 1) for n = 6."""
    assert mcnemar([True] * 10 + [False] * 2, [False] * 10 + [True] * 2) == pytest.approx(0.03857, abs=1e-5)
    assert mcnemar([True] * 5 + [False] + [True] * 90, [False] * 5 + [True] + [True] * 90) == pytest.approx(0.21875)
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([True, False], [False, True]) == 1.0


@pytest.mark.slow
def test_mcnemar_rejects_equals_in_at_most_one_case_of_twenty() -> None:
    rng = np.random.default_rng(0)
    rejected = sum(
        mcnemar((rng.random(200) < 0.9).tolist(), (rng.random(200) < 0.9).tolist()) < 0.05 for _ in range(2000)
    )
    assert 0.01 <= rejected / 2000 <= 0.05


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_proportion(case: tuple[int, int]) -> None:
    successes, count = case
    low, high = wilson_interval(successes, count)
    assert 0 <= low <= successes / count + 1e-12 and successes / count - 1e-12 <= high <= 1


def test_wilson_interval_known_values() -> None:
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
