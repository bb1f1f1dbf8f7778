"""The latency of a checkpoint's folder as one call: it is silent by itself, and tells a reporter what goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.data.scan import Dataset
from dpn_cli.errors import DataError, UsageError
from dpn_cli.evaluation import bench
from dpn_cli.evaluation.bench import BenchOptions, SyntheticPrompts, bench_folder
from dpn_cli.reporter import Reporter
from tests.runs import noise_pictures


def test_a_call_is_silent_unless_a_reporter_listens(
    make_converted: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, prompts = make_converted(), SyntheticPrompts(text_tokens=(4,))
    route = "keep,1x2,2x2,keep,exit"
    options = BenchOptions(budgets=(0.6,), routes=(route,), batch_sizes=(2,), new_tokens=2, rounds=1)
    quiet = bench_folder(folder, prompts, options)
    assert capfd.readouterr() == ("", "")
    said: list[str] = []
    steps: dict[str, tuple[int, list[int]]] = {}

    @contextmanager
    def counted(description: str, total: int) -> Iterator[Any]:
        steps[description] = (total, [])
        yield steps[description][1].append

    told = bench_folder(folder, prompts, options, Reporter(said.append, counted))
    assert [line for found in told.lineups for line in found.remarks] == said and "routes nearest to 0.6" in said[0]
    assert steps == {"batch of 2": (6, [1] * 6)}, "three methods, warm-up and round"
    assert [[each.fraction for each in result.measurements] for result in quiet.results] == [
        [each.fraction for each in result.measurements] for result in told.results
    ]
    assert quiet.to_dict()["checkpoint"] == str(folder) and not quiet.has_data


def test_every_round_needs_samples_of_its_own(
    make_converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpn_cli.evaluation.bench.load_opened", None)  # said before the model is loaded
    (tmp_path / "pictures").mkdir()
    pictures = DataOptions(str(noise_pictures(tmp_path / "pictures", 3)))
    with pytest.raises(DataError, match="has 3 samples with an image, but 2 rounds of 2 need 4"):
        bench_folder(make_converted(), pictures, BenchOptions(batch_sizes=(1, 2), rounds=2))


def test_the_data_is_read_once_for_all_batch_sizes(
    make_converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int | None] = []

    def counted(*args: Any, limit: int | None, **options: Any) -> Dataset:
        limits.append(limit)
        return load_data(*args, limit=limit, **options)

    monkeypatch.setattr(bench, "load_data", counted)
    options = BenchOptions(batch_sizes=(1, 3), new_tokens=1, rounds=2)
    told = bench.bench_folder(make_converted(), DataOptions("demo"), options)
    assert limits == [6]
    assert [(each.batch_size, each.rounds) for each in told.results] == [(1, 2), (3, 2)]
    samples: list[Any] = list(range(6))
    assert bench._in_batches(samples, 1, 2) == [[0], [3]], "from all over what was drawn"
    assert bench._in_batches(samples, 3, 2) == [[0, 1, 2], [3, 4, 5]]


def test_what_the_pyramid_does_not_have_is_refused_before_the_model_is_loaded(
    make_converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_converted()
    monkeypatch.setattr("dpn_cli.evaluation.bench.load_opened", None)
    with pytest.raises(UsageError, match="out of reach"):
        bench_folder(folder, SyntheticPrompts(), BenchOptions(budgets=(0.01,)))
    with pytest.raises(UsageError, match="expected 5 experts"):
        bench_folder(folder, SyntheticPrompts(), BenchOptions(routes=("2,2",)))
