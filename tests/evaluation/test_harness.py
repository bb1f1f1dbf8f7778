"""lmms-eval as a program, with a stand-in that takes the same options and leaves the same files."""

import json
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from dpn_cli.cli import main
from dpn_cli.errors import DpnError, MissingExtraError, UsageError
from dpn_cli.evaluation import harness
from dpn_cli.evaluation.harness import PAPER_TASKS, run_benchmarks

ROOT = Path(__file__).parents[2]
STAND_IN = """
import json, sys
from pathlib import Path

arguments = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
assert sys.argv[1] == "eval"
model = dict(pair.split("=", 1) for pair in arguments["--model_args"].split(","))
print("asked", arguments["--tasks"], "limit", arguments.get("--limit"), "of", arguments["--model"])
if model["pretrained"].endswith("broken"):
    print("Error during evaluation: no such thing")
    raise SystemExit(0)  # as the real one does
score = 0.9 if model.get("teacher") == "True" else float(model.get("budget", 0.1))
results = {
    task: {"alias": task, "exact_match,none": score, "exact_match_stderr,none": 0.01, "submission,none": None}
    for task in arguments["--tasks"].split(",")
}
folder = Path(arguments["--output_path"], "some__model")
folder.mkdir()
counts = {task: {"original": 40, "effective": int(arguments.get("--limit", 40))} for task in results}
text = json.dumps({"results": results, "n-samples": counts})
folder.joinpath("20261124_120000_results.json").write_text(text)
fraction = 1.0 if "teacher" in model else 0.48
Path(model["record"]).write_text(json.dumps({task: fraction for task in results}))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")


@pytest.mark.usefixtures("stand_in")
def test_teacher_and_pyramid_side_by_side(tmp_path: Path) -> None:
    lines: list[str] = []
    rows = run_benchmarks(tmp_path, ["gqa", "pope"], [0.5, 0.44], limit=7, say=lines.append)
    assert [(row.task, row.metric, row.samples) for row in rows] == [
        ("gqa", "exact_match", 7),
        ("pope", "exact_match", 7),
    ]
    assert rows[0].scores == {"teacher": 0.9, "dpn at 0.5": 0.5, "dpn at 0.44": 0.44}
    assert rows[0].fractions == {"teacher": 1.0, "dpn at 0.5": 0.48, "dpn at 0.44": 0.48}
    assert lines.count("asked gqa,pope limit 7 of dpn") == 3


@pytest.mark.usefixtures("stand_in")
def test_a_run_without_results_is_an_error_though_it_exits_with_0(tmp_path: Path) -> None:
    with pytest.raises(DpnError, match="no such thing"):
        run_benchmarks(tmp_path / "broken", ["gqa"])


@pytest.mark.usefixtures("stand_in")
def test_the_harness_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger").mkdir()
    monkeypatch.chdir(tmp_path / "stranger")
    for module in ("lmms_eval", "json", "torch"):
        Path(f"{module}.py").write_text("import os; os.mkdir('ran')")
    assert run_benchmarks(tmp_path, ["gqa"])
    assert not Path("ran").exists()


@pytest.mark.usefixtures("stand_in")
def test_the_command_prints_what_the_harness_found(
    make_converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make_converted())
    assert main(["eval", "--model", folder, "--tasks", "gqa", "--budget", "0.01"]) == 2
    captured = capsys.readouterr()
    assert "out of reach" in captured.err and "teacher" not in captured.err, "nothing was asked"
    assert main(["eval", "--model", folder, "--tasks", "gqa", "--json"]) == 0
    captured = capsys.readouterr()
    [row] = json.loads(captured.out)["benchmarks"]
    assert row["scores"] == {"teacher": 0.9, "dpn": 0.1}
    assert json.loads(captured.out)["budgets"] == [{"asked": 0.7, "spent": 0.48, "samples": 40}]
    assert "Budget 0.7 was not met: these 40 samples spent 0.480" in captured.err
    assert main(["eval", "--model", folder, "--tasks", "paper", "--budget", "0.6"]) == 0
    out = capsys.readouterr().out
    assert all(task in out for task in PAPER_TASKS)
    assert all(word in out for word in ("dpn", "at", "0.6")), "heads break at words"


def test_what_is_missing_or_in_the_way_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"dpn-cli\[harness\]"):
        run_benchmarks(tmp_path, ["gqa"])
    monkeypatch.setattr(harness, "find_spec", lambda name: sys)
    with pytest.raises(UsageError, match="comma"):
        run_benchmarks(tmp_path / "a,b", ["gqa"])
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    for options in ([], ["--tasks", "gqa", "--data", "demo"], ["--tasks", "gqa", "--against", "fastv"]):
        assert main(["eval", "--model", str(tmp_path), *options]) == 2
        assert "--tasks" in capsys.readouterr().err


def test_the_plugin_is_declared_and_the_ten_tasks_are_the_papers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["lmms_eval.models"]["dpn"]
    assert EntryPoint("dpn", declared, "lmms_eval.models").load() is harness.manifest
    assert "harness" in project["optional-dependencies"]
    runs = yaml.safe_load((ROOT / "benchmarks" / "lmms_tasks.yaml").read_text())
    assert [tuple(run["tasks"].split(",")) for run in runs] == [PAPER_TASKS] * 2
    assert ["teacher=True" in run["model_args"] for run in runs] == [True, False]
