"""`dpn bench`: what it prints, and what it refuses before anything is measured."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpn_cli.cli import main

QUICK = ("--rounds", "2", "--new-tokens", "2")
SHORT = (*QUICK, "--text-tokens", "4")


def test_methods_at_a_budget(
    make_converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, picture = make_converted(), tmp_path / "latency.svg"
    set_pyramid(folder, budgets=[[0.46, 3.0, 0.05]])
    command = ["bench", "--model", str(folder), "--budget", "0.46", "--against", "fastv,prepool"]
    command += ["--route", "keep,1x2,2x2,keep,exit"]
    sizes = ["--batch-size", "1", "--batch-size", "3", "--text-tokens", "4,16"]
    assert main([*command, *sizes, *QUICK, "--rounds", "1", "--plot", str(picture), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [run["batch_size"] for run in data["runs"]] == [1, 3]
    assert all("routes nearest to 0.46 are set" in run["remarks"][0] for run in data["runs"])
    assert [run["prompt_tokens"] for run in data["runs"]] == [148, 160]
    for run in data["runs"]:
        original, dpn, fastv, prepool, fixed = run["measurements"]
        assert (original["name"], original["fraction"], original["ideal_speedup"]) == ("original", 1.0, 1.0)
        assert (dpn["name"], fixed["name"]) == ("dpn at 0.46", "fixed keep,pool:1x2,pool:2x2,keep,exit")
        assert dpn["fraction"] == pytest.approx(0.46, abs=0.02), "the routers are not left to noise"
        assert fastv["fraction"] == pytest.approx(dpn["fraction"], abs=0.01)
        assert [budget["asked"] for budget in run["budgets"]] == [0.46]
        assert prepool["kv_bytes"] < original["kv_bytes"]
        assert original["phases"].keys() == {"vision", "prefill", "first_token", "decode"}
    assert ">fixed keep,pool:1x2,pool:2x2,keep,exit<" in picture.read_text()


def test_real_prompts_bring_fidelity(make_converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_converted()
    assert main(["bench", "--model", str(folder), "--data", "demo", *QUICK, "--wide"]) == 0
    out = capsys.readouterr().out
    for text in ("attention kernels", "vision tower", "decode, per token", "100.0%", "dpn"):
        assert text in out


def test_on_real_prompts_others_spend_what_the_routers_spend(
    make_converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_converted()
    line = ["bench", "--model", str(folder), "--data", "demo", "--budget", "0.8", "--against", "fastv,random,fixed"]
    assert main([*line, *QUICK, "--batch-size", "2", "--json"]) == 0
    captured = capsys.readouterr()
    [run] = json.loads(captured.out)["runs"]
    _, dpn, fastv, random, fixed = run["measurements"]
    [budget] = run["budgets"]
    assert (budget["asked"], budget["samples"]) == (0.8, 4)
    assert dpn["fraction"] == pytest.approx(budget["spent"], abs=0.02)
    assert abs(budget["spent"] - 0.8) > 0.05, "these routers are random: the budget cannot be met"
    assert f"Budget 0.8 was not met: these 4 samples spent {budget['spent']:.3f}" in captured.err
    assert f"dpn calibrate --model {folder} --data demo --budgets-only" in captured.err
    assert fastv["fraction"] == pytest.approx(dpn["fraction"], abs=0.01)
    assert random["fraction"] == pytest.approx(dpn["fraction"], abs=0.01)
    unequal = abs(fixed["fraction"] - dpn["fraction"]) > 0.01
    assert unequal == any("fixed" in remark and "Not equal" in remark for remark in run["remarks"])


def set_pyramid(folder: Path, **changes: object) -> None:
    config = folder / "config.json"
    data = json.loads(config.read_text())
    data["pyramid"] |= changes
    config.write_text(json.dumps(data))


def test_a_checkpoint_runs_at_its_own_budget_and_on_prompts_of_the_calibrations_length(
    make_converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_converted()
    length = {"text_tokens": 10, "grids": [[12, 12]]}
    set_pyramid(folder, budgets=[[0.5 - 0.02 * i, 1 + 0.4 * i, 0.01] for i in range(6)], calibration=length)
    assert main(["bench", "--model", str(folder), *QUICK, "--json"]) == 0
    [run] = json.loads(capsys.readouterr().out)["runs"]
    assert run["prompt_tokens"] == 144 + 10
    assert [budget["asked"] for budget in run["budgets"]] == [0.45], "λ = 2 is half way from 0.5 to 0.4"
    assert run["measurements"][1]["fraction"] == pytest.approx(0.45, abs=0.04)


def test_a_method_that_cannot_spend_so_little_is_left_out(
    make_converted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    set_pyramid(folder := make_converted(), budgets=[[0.24, 9.0, 0.2]])
    line = ["bench", "--model", str(folder), "--budget", "0.24", "--against", "fastv,prepool", *SHORT]
    assert main([*line, "--json"]) == 0
    captured = capsys.readouterr()
    assert "Left out, fastv at 0.24: fastv cannot spend less than" in captured.err
    names = [each["name"] for each in json.loads(captured.out)["runs"][0]["measurements"]]
    assert names[:2] == ["original", "dpn at 0.24"]
    assert [name.split()[0] for name in names[2:]] == ["prepool"]
    assert main([*line, "--text-tokens", "64"]) == 2, "no route spends so little on longer prompts"
    assert "budget 0.24 is out of reach of these synthetic prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "fastv"], "--budget"),
        (["--budget", "0.6", "--against", "fastw"], "Did you mean 'fastv'?"),
        (["--budget", "0.01"], "out of reach"),
        (["--route", "2,2"], "expected 5 experts, one for each site"),
        (["--route", "a"], "one for each site of this pyramid, such as keep,keep,keep,keep,keep"),
        (["--text-tokens", "1"], "32,64,128"),
        (["--plot", "picture.bmp"], ".png"),
        (["--plot", "x" * 5000 + ".png"], "File name too long"),
        (["--data", "demo", "--text-tokens", "4"], "--text-tokens"),
        (["--ignore-fields", "x"], "--ignore-fields has no effect without --data"),
        (["--text-tokens", "4,1000000000"], "but the model takes 2048"),
        (["--images", "250"], "but the model takes 2048"),
        (["--new-tokens", "1000000000"], "but the model takes 2048"),
        (["--batch-size", "1000000000"], "1<=x<=4096"),
        (["--rounds", "1" + "0" * 30], "1<=x<=10000"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    make_converted: Callable[..., Path],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "--model", str(make_converted()), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("options", [[], ["--budget", "0.6"], ["--data", "demo"]])
def test_a_model_of_nan_is_refused(
    make_converted: Callable[..., Path], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_converted()
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight") and "language_model" in name)
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, file, metadata={"format": "pt"})
    assert main(["bench", "--model", str(folder), *QUICK, *options]) == 3
    captured = capsys.readouterr()
    assert "q_proj.weight' holds NaN" in captured.err and captured.out == ""


def test_larger_images_have_more_tiles_to_prefill(
    tiny_tiled: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tiny_tiled("llava_next")), "-o", str(tmp_path / "out")]) == 0

    def flops(size: str) -> float:
        capsys.readouterr()
        options = ["--image-size", size, "--rounds", "1", "--new-tokens", "2", "--json"]
        assert main(["bench", "--model", str(tmp_path / "out"), *options]) == 0
        [run] = json.loads(capsys.readouterr().out)["runs"]
        return float(run["measurements"][0]["flops"])

    assert flops("24x24") < flops("48x48")
