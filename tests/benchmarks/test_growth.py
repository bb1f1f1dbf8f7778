import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, which imports its neighbour as a script does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import growth

    yield growth
    for name in ("growth", "conversion"):
        sys.modules.pop(name)


def test_growth_is_told_by_what_further_samples_take(
    growth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conversion import Run

    lines: list[list[str]] = []

    def run(*args: Any) -> Run:
        lines.append(list(map(str, args)))
        samples = int(args[args.index("--samples") + 1]) if "--samples" in args else 0
        if "convert" in args:
            Path(args[-1]).mkdir()
        return Run(1.0, cpu_seconds=10 + 0.25 * samples, peak_bytes=700_000_000 + samples)

    monkeypatch.setattr(growth, "run", run)
    sizes = ["--calibrate", "128", "--calibrate", "64", "--eval", "10"]
    found = CliRunner().invoke(growth.main, [*sizes, "--plot", str(tmp_path / "growth.svg")], catch_exceptions=False)
    rows = [line.split() for line in found.output.splitlines() if line.split()[:1] in (["calibrate"], ["eval"])]
    assert rows == [["calibrate", "64", "26.0", "700"], ["calibrate", "128", "42.0", "250", "700"],
                    ["eval", "10", "12.5", "700"]]  # fmt: skip
    assert [next(word for word in line if word in ("convert", "calibrate", "eval")) for line in lines] == [
        "convert", "calibrate", "calibrate", "eval",
    ]  # fmt: skip
    assert ">samples<" in (tmp_path / "growth.svg").read_text()


@pytest.mark.slow
def test_a_small_case_runs(growth: Any) -> None:
    found = CliRunner().invoke(growth.main, ["--calibrate", "16", "--eval", "2"], catch_exceptions=False)
    assert found.exit_code == 0 and found.output.count("CPU s") >= 2
