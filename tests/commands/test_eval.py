"""`dpn eval`, from the command line to its table and JSON."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpn_cli import channels
from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.cli import main
from dpn_cli.evaluation.baselines import BASELINES
from dpn_cli.evaluation.evaluate import Result
from dpn_cli.evaluation.judging import Evaluator
from tests.runs import digests
from tests.test_channels import Full


@pytest.fixture
def data(make_converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight labelled rows and one without an image, beside a `tiny-dpn` that looks calibrated."""
    folder = make_converted().parent
    monkeypatch.chdir(folder)
    pixels = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {"conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]}
    ]
    for i in range(8):
        Image.fromarray(pixels.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        chat = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": "red circle"}]
        rows.append({"id": i, "image": f"{i}.png", "conversations": chat, "level": i % 3})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def evaluate(*options: str) -> int:
    return main(["eval", "--model", "tiny-dpn", "--data", "data.json", "--max-new-tokens", "2", *options])


def test_methods_are_compared_at_equal_flops(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(data)
    assert evaluate("--budget", "0.8", "--budget", "0.6", "--against", "all", "--samples", "4", "--json") == 0
    new = digests(data).keys() - before.keys()
    assert new == {f"tiny-dpn/evaluation/report.{kind}" for kind in ("json", "html")}
    assert digests(data).items() >= before.items(), "nothing else is written, and nothing is left in .dpn"
    result = json.loads(capsys.readouterr().out)
    original, *others = result["results"]
    assert (original["method"], original["figures"]["fraction"], result["samples"]) == ("original", 1.0, 4)
    assert original["figures"]["accuracy"]["mcnemar"] == 1.0
    names = [each["method"] for each in others if each["budget"] == 0.6]
    assert names == ["dpn", *BASELINES]
    for budget in (0.8, 0.6):
        dpn, *rivals = [each for each in others if each["budget"] == budget]
        for rival in rivals:
            near = 0.25 if rival["method"] == "fixed" else 0.04
            assert rival["figures"]["fraction"] == pytest.approx(dpn["figures"]["fraction"], abs=near)
            over = rival["figures"]["distortion"]["value"] - dpn["figures"]["distortion"]["value"]
            assert rival["distortion_over_dpn"]["value"] == pytest.approx(over)


def test_an_evaluation_is_added_to_without_asking_again(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    judge = Evaluator._judge_batch

    def judging(self: Evaluator, methods: Any, *rest: Any) -> Any:
        asked.extend(method.name for method in methods)
        return judge(self, methods, *rest)

    def results(*options: str) -> dict[str, Any]:
        asked.clear()
        assert evaluate("--batch-size", "8", *options, "--json") == 0
        return {each["label"]: each for each in json.loads(capsys.readouterr().out)["results"]}

    monkeypatch.setattr(Evaluator, "_judge_batch", judging)
    first = results("--budget", "0.8", "--against", "stride")
    assert asked == ["dpn", "stride"]
    report = read_json(data / "tiny-dpn" / "evaluation" / "report.json")
    assert report["results"][1] == first["dpn"] and report["questions"][0].keys() == {"kind", "label", "teacher"}
    page = (data / "tiny-dpn" / "evaluation" / "report.html").read_text()
    lost = round(8 * (1 - first["dpn"]["figures"]["same_answer"]["value"]))
    assert lost and f"<b>{lost} of 8</b> answers changed" in page and page.count("<article>") == lost
    assert "stride" in page and "http:" not in page and "https:" not in page
    with monkeypatch.context() as patch:
        patch.setattr("dpn_cli.evaluation.asking.generate_texts", None)  # nobody answers
        assert results("--budget", "0.8", "--against", "stride", "--by", "level") and asked == []
    more = results("--budget", "0.8", "--against", "random,stride")
    assert asked == ["random"] and first.items() <= more.items()
    assert results("--budget", "0.6", "--against", "random") and asked == ["dpn"], "which spends the same"
    evaluated = data / "tiny-dpn" / "evaluation"
    before = (evaluated / "report.json").read_bytes()
    assert results("--budget", "0.8", "--samples", "7") and asked == ["dpn"], "other samples: nothing is known"
    assert (evaluated / "earlier" / "1" / "report.json").read_bytes() == before
    assert (evaluated / "earlier" / "1" / "report.html").is_file() and not (evaluated / "earlier" / "2").exists()


def test_fixed_routes_are_asked_too(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routes = ["diverse:0.5+8x8,keep,keep,keep,keep", "keep,1x2,2x2,keep,exit"]
    assert evaluate("--budget", "0.8", *(part for route in routes for part in ("--route", route)), "--json") == 0
    _, dpn, *fixed = json.loads(capsys.readouterr().out)["results"]
    assert dpn["method"] == "dpn" and [each["method"] for each in fixed] == ["fixed"] * 2
    assert [each["label"] for each in fixed] == [f"fixed {routes[0]}", "fixed keep,pool:1x2,pool:2x2,keep,exit"]
    assert fixed[0]["figures"]["fraction"] > fixed[1]["figures"]["fraction"]


@pytest.mark.parametrize(
    ("route", "complaint"),
    [
        ("keep,exit", "expected 5 experts, one for each site of this pyramid, such as"),
        ("keep,1x2,2x2,keep,exti", "Did you mean 'exit'?"),
        ("diverse:0.5+8x8,1x2,keep,keep,keep", "route diverse:0.5+8x8,pool:1x2,keep,keep,keep: pool:1x2 needs a grid"),
    ],
)
def test_a_route_that_cannot_be_taken_is_refused(
    data: Path, capsys: pytest.CaptureFixture[str], route: str, complaint: str
) -> None:
    assert evaluate("--route", route) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err and "both models answer" not in captured.err


def test_what_was_asked_and_what_was_spent(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--budget", "0.8", "--against", "fixed,fastv", "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    _, dpn, *rivals = result["results"]
    spent = dpn["figures"]["fraction"]
    assert result["budgets"] == [{"asked": 0.8, "spent": spent, "samples": 8}]
    assert abs(spent - 0.8) > 0.05, "these routers are random: the budget cannot be met"
    assert f"Budget 0.8 was not met: these 8 samples spent {spent:.3f} on average." in captured.err
    assert "λ was solved on mydata|2.json" in captured.err
    assert "dpn calibrate --model tiny-dpn --data data.json --budgets-only" in captured.err
    for rival in rivals:
        over = rival["figures"]["fraction"] - spent
        assert rival["fraction_over_dpn"] == pytest.approx(over)
        said = [line for line in result["not_equal"] if rival["label"] in line]
        assert bool(said) == (abs(over) > 0.01)
    assert evaluate("--json") == 0
    [own] = json.loads(capsys.readouterr().out)["budgets"]
    assert own["asked"] == 0.7, "λ = 2 is half way from 0.8 to 0.6"


def test_the_table_names_what_is_out_of_reach(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--budget", "0.7", "--budget", "0.2", "--against", "fastv") == 0
    captured = capsys.readouterr()
    assert "dpn at budget 0.7" not in captured.out, "there is one kind of question only"
    [fastv] = [line for line in captured.out.splitlines() if "fastv" in line]
    assert fastv.split()[0] == "0.7"
    assert "Left out: dpn at 0.2: budget 0.2 is out of reach: this pyramid's cheapest is 0.600" in captured.err
    assert "Left out: fastv at 0.2: fastv cannot spend less than 0.2" in captured.err


def test_figures_are_grouped_by_a_field_of_the_data(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--json", "--by", "level") == 0
    for found in json.loads(capsys.readouterr().out)["results"]:
        assert {kind: figures["count"] for kind, figures in found["kinds"].items()} == {"0": 3, "1": 3, "2": 2}
    assert evaluate("--by", "level") == 0
    assert "dpn, by kind of question" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data.json", "they have id, image, level. Did you mean 'level'?"),
        ("demo", "they have kind"),
        (".", "they have none"),
    ],
)
def test_a_field_that_is_not_there_is_refused_before_the_model_is_loaded(
    data: Path, source: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpn_cli.evaluation.run.load_opened", None)
    if source == ".":
        (data / "data.json").unlink()
    assert main(["eval", "--model", "tiny-dpn", "--data", source, "--samples", "8", "--by", "levels"]) == 2
    assert message in capsys.readouterr().err


def test_rows_without_the_field_are_a_group_of_their_own(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((data / "data.json").read_text())
    rows[1] |= {"level": 0.5}
    del rows[2]["level"]
    (data / "data.json").write_text(json.dumps(rows))
    assert evaluate("--by", "level", "--json") == 0
    kinds = json.loads(capsys.readouterr().out)["results"][0]["kinds"]
    assert {kind: figures["count"] for kind, figures in kinds.items()} == {
        "0.5": 1, "without": 1, "2": 2, "0": 2, "1": 2,
    }  # fmt: skip


def test_without_labels_the_teacher_is_the_measure(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "data.json").unlink()
    line = ["eval", "--model", "tiny-dpn", "--data", ".", "--max-new-tokens", "3", "--samples", "4"]
    assert main(line) == 0
    table = capsys.readouterr().out
    assert "same answer" in table and "accuracy" not in table and "McNemar" not in table
    assert main([*line, "--json"]) == 0
    original, dpn = json.loads(capsys.readouterr().out)["results"]
    assert original["figures"]["accuracy"] is dpn["figures"]["accuracy"] is None
    assert original["figures"]["same_answer"]["value"] == 1.0 and dpn["figures"]["distortion"]["value"] > 0


def test_wrong_requests_are_one_sentence(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "tiny-dpn", "--tasks", "pope", "--by", "kind"]) == 2
    assert "--tasks has groups of its own" in capsys.readouterr().err
    pictured = ["--tasks", "pope", "--plot", "a.png", "--seed", "1", "--wide"]
    assert main(["eval", "--model", "tiny-dpn", *pictured]) == 2
    assert "--tasks asks, scores and prints in its own way: leave out --seed, --plot, --wide" in capsys.readouterr().err
    assert main(["eval", "--model", "tiny-dpn", "--tasks", "pope", "--columns", "image=a", "--stream"]) == 2
    assert "--columns, --stream has no effect without --data" in capsys.readouterr().err
    assert evaluate("--include-path", ".") == 2
    assert "--include-path is a folder of --tasks" in capsys.readouterr().err
    assert evaluate("--metric", "choice") == 2
    assert "--metric choice scores by the letter of the option, but" in capsys.readouterr().err
    for unknown in ("fastw", "original"):
        assert evaluate("--against", unknown) == 2
        assert f"'{unknown}' is not one of fixed" in capsys.readouterr().err
    assert evaluate("--budget", "0.2") == 2
    error = capsys.readouterr().err
    assert "out of reach" in error and "asking" not in error, "it is refused before anything is asked"
    for command in ("eval", "bench"):
        assert main([command, "--model", "tiny-dpn", "--data", "data.json", "--ignore-fields", "levels"]) == 4
        assert "--ignore-fields levels: data.json has the fields" in capsys.readouterr().err
    (data / "data.json").write_text(json.dumps(json.loads((data / "data.json").read_text())[:1]))
    assert evaluate() == 4
    assert "no sample with an image" in capsys.readouterr().err
    assert main(["eval", "--model", "nowhere", "--data", "data.json"]) == 3


def test_an_interrupted_run_goes_on(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("--json", "--batch-size", "3", "--against", "random") == 0
    undisturbed = capsys.readouterr().out
    (data / "tiny-dpn" / "evaluation" / "report.json").unlink()
    batches: list[int] = []
    judge = Evaluator._judge_batch

    def interrupted(self: Evaluator, methods: Any, samples: Any, *rest: Any) -> Any:
        batches.append(len(samples))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return judge(self, methods, samples, *rest)

    monkeypatch.setattr(Evaluator, "_judge_batch", interrupted)
    assert evaluate("--json", "--batch-size", "3", "--against", "random") == 130
    assert "Nothing that was measured is lost: run the same command line again" in capsys.readouterr().err
    assert evaluate("--json", "--batch-size", "3", "--against", "random") == 0
    assert capsys.readouterr().out == undisturbed
    assert batches == [3, 3, 2, 2, 3, 3, 2], "the first two batches of the pyramid are not judged again"
    assert not (data / ".dpn" / "evaluation").exists()


@pytest.mark.parametrize(
    "file",
    ["tokenizer.json", "config.json", pytest.param("chat_template.jinja", marks=pytest.mark.slow)],
)
def test_what_was_found_with_other_files_is_not_used(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Result, "of", raise_interrupt)
        assert evaluate("--json") == 130
    assert list(data.glob(".dpn/evaluation/*/*.json"))
    (data / "tiny-dpn" / file).open("a").write(" ")
    if file == "config.json":
        config = read_json(data / "tiny-dpn" / file)
        config["text_config"]["rms_norm_eps"] = 0.01
        write_json(data / "tiny-dpn" / file, config)
    capsys.readouterr()
    assert evaluate("--json") == 0
    error = capsys.readouterr().err
    assert re.search(rf"Starting over: the unfinished evaluation in \S+ had other values of {file}", error), error
    assert "both models answer: 8/8" in error


def raise_interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_the_same_evaluation_is_run_once_at_a_time(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = []
    judge = Evaluator.judge

    def meanwhile(self: Evaluator, *args: Any) -> Any:
        if not codes:
            codes.append(evaluate())
            codes.append(evaluate("--max-new-tokens", "1"))  # another one
        return judge(self, *args)

    monkeypatch.setattr(Evaluator, "judge", meanwhile)
    assert evaluate() == 0 and codes == [2, 0]
    error = capsys.readouterr().err
    assert "Error: this evaluation is being run by another run" in error and "wait for it, or stop it" in error
    assert not (data / ".dpn").exists()


def test_a_folder_that_is_evaluated_is_not_replaced(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llava: Path
) -> None:
    judge = Evaluator.judge

    def meanwhile(self: Evaluator, *args: Any) -> Any:
        assert main(["convert", str(tiny_llava), "--force", "-o", "tiny-dpn"]) == 2
        return judge(self, *args)

    monkeypatch.setattr(Evaluator, "judge", meanwhile)
    assert evaluate() == 0
    assert "tiny-dpn is in use by another run: wait for it to finish, or stop it" in capsys.readouterr().err


def test_where_nothing_can_be_kept_it_is_said_and_all_is_found(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)
    assert evaluate() == 1
    captured = capsys.readouterr()
    assert "cannot be written (Read-only file system): no results are kept" in captured.err
    assert "the results are complete, but " in captured.err.splitlines()[-1] and "dpn" in captured.out


def test_of_a_checkpoint_that_cannot_be_written_the_results_are_shown(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != Path("tiny-dpn") and access(path, mode))
    assert evaluate() == 0
    captured = capsys.readouterr()
    assert "tiny-dpn cannot be written, so the results are shown, but not kept in it" in captured.err.splitlines()[0]
    assert "dpn" in captured.out and not (data / "tiny-dpn" / "evaluation").exists()


@pytest.mark.parametrize("option", [[], pytest.param(["--json"], marks=pytest.mark.slow)])
def test_a_picture_that_fails_costs_no_results(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    assert evaluate(*option) == 0
    undisturbed = capsys.readouterr().out
    (data / "pictures").mkdir()
    line = [*option, "--plot", "pictures/frontier.png"]
    judge = Evaluator.judge

    def meanwhile(self: Evaluator, *args: Any) -> Any:
        shutil.rmtree("pictures")
        Path("pictures").touch()
        return judge(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "judge", meanwhile)
        assert evaluate(*line) == 1
    captured = capsys.readouterr()
    assert captured.out == undisturbed
    error = "Error: the results are complete, but the picture pictures/frontier.png is not drawn: pictures cannot be"
    assert captured.err.splitlines()[-1].startswith(error)
    (data / "pictures").unlink()
    (data / "pictures").mkdir()
    monkeypatch.setattr(Evaluator, "_judge_batch", None)
    assert evaluate(*line) == 0, "nothing is asked again"
    captured = capsys.readouterr()
    assert (data / "pictures" / "frontier.png").is_file() and captured.out == undisturbed
    assert "Picture: pictures/frontier.png" in captured.err.splitlines()
    assert not (data / ".dpn").exists()


def test_a_report_of_somebody_elses_stays(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = data / "tiny-dpn" / "evaluation" / "report.json"
    report.parent.mkdir()
    report.write_text('{"mine": 1}')
    assert evaluate("--json") == 1
    captured = capsys.readouterr()
    failure = f"the results are complete, but {report.relative_to(data)} and .html are not written: it is not dpn's"
    assert captured.err.endswith(f"Error: {failure}\n")
    assert json.loads(captured.out)["samples"] == 8
    assert [path.read_text() for path in report.parent.iterdir()] == ['{"mine": 1}']
    report.write_text('{"known": {')
    assert evaluate("--json") == 1
    damaged = f"{report.relative_to(data)} and .html are not written: what is there is damaged: delete it, and run"
    assert damaged in capsys.readouterr().err and report.read_text() == '{"known": {'
    report.write_text('{"known": {}, "depends_on": {}}')
    (report.parent / "earlier").write_text("mine")
    assert evaluate("--json") == 1
    assert "evaluation/earlier is not a folder: rename or delete it" in capsys.readouterr().err
    assert report.read_text() == '{"known": {}, "depends_on": {}}'
    (report.parent / "earlier").unlink()
    report.unlink()
    report.parent.rmdir()
    report.parent.symlink_to(data)
    assert evaluate() == 3
    assert "is a symbolic link out of its folder" in capsys.readouterr().err


def test_results_that_could_not_be_printed_are_kept(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("--json") == 0
    undisturbed = capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Full())
        patch.setattr(channels, "silence", lambda *numbers: None)  # it is not this process's own
        assert evaluate("--json") == 1
    assert "stdout cannot be written (No space left on device): the results are not shown" in capsys.readouterr().err
    monkeypatch.setattr(Evaluator, "_judge_batch", None)
    assert evaluate("--json") == 0
    assert capsys.readouterr().out == undisturbed


def test_a_place_for_what_is_kept_that_is_lost_meanwhile_costs_no_results(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("--json") == 0
    undisturbed = capsys.readouterr().out
    judge = Evaluator.judge

    def meanwhile(self: Evaluator, *args: Any) -> Any:
        shutil.rmtree(".dpn")
        Path(".dpn").touch()
        return judge(self, *args)

    monkeypatch.setattr(Evaluator, "judge", meanwhile)
    assert evaluate("--json", "--batch-size", "2") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["samples"] == json.loads(undisturbed)["samples"]
    assert captured.err.count("cannot be written (") == 1 and "cannot be resumed" in captured.err


@pytest.mark.slow
def test_a_killed_run_goes_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--json", "--batch-size", "1", "--against", "random,fastv") == 0
    undisturbed = capsys.readouterr().out
    shutil.rmtree("tiny-dpn/evaluation")  # what is known is not asked for again
    line = ["eval", "--model", "tiny-dpn", "--data", "data.json", "--max-new-tokens", "2"]
    command = [sys.executable, "-m", "dpn_cli", *line, "--json", "--batch-size", "1", "--against", "random,fastv"]
    for wanted in (3, 11):  # while the teacher and the pyramid are asked, and while the other methods are
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(Path(".dpn", "evaluation").glob("*/*.json"))) < wanted:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.kill()
        process.wait()
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == undisturbed
    assert "both models answer: 8/8" in found.stderr
    assert not (data / ".dpn" / "evaluation").exists()


@pytest.mark.slow
def test_processes_find_together_what_one_finds(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--json", "--batch-size", "3", "--against", "random") == 0
    alone = capsys.readouterr().out
    line = ["eval", "--model", "tiny-dpn", "--data", "data.json", "--max-new-tokens", "2", "--json"]
    command = [sys.executable, "-m", "dpn_cli", *line, "--batch-size", "3", "--against", "random"]
    together = subprocess.run([*command, "--num-processes", "2"], capture_output=True, text=True, check=True)
    assert together.stdout == alone
    assert together.stderr.count("8 samples from data.json") == 1, "the main process alone speaks"
