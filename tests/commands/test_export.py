import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpn_cli.cli import main
from tests.converted import pretend_calibration


@pytest.fixture
def here(make_converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a converted, uncalibrated checkpoint `tiny-dpn`."""
    make_converted(calibrated=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_current_checkpoint_is_exported_beside_it(
    here: Path, tiny_llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tiny_llava), "-o", "llava-dpn"]) == 0
    capsys.readouterr()
    assert main(["export"]) == 2
    message = capsys.readouterr().err
    assert "is not calibrated, so its export would keep all tokens: run `dpn calibrate" in message
    assert not (here / "llava-dpn-export").exists()
    assert main(["export", "--uncalibrated"]) == 0
    captured = capsys.readouterr()
    assert f"Checkpoint: {here / 'llava-dpn'}" in captured.err
    assert "not calibrated" in captured.out
    assert "dpn_cli.load('llava-dpn-export')" in captured.err and "trust_remote_code=True" in captured.err
    assert (here / "llava-dpn-export" / "modeling_dpn_llava.py").is_file()
    assert main(["inspect", "llava-dpn-export", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pyramid"]["sites"]


def test_json_says_what_was_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_calibration(here / "tiny-dpn")
    options = ["--budget", "0.6", "--dtype", "bf16", "--max-shard-size", "200KB", "--json"]
    assert main(["export", "--model", "tiny-dpn", "-o", "out", *options]) == 0
    captured = capsys.readouterr()
    done = json.loads(captured.out)
    assert captured.err.startswith("writing weights: ") and captured.err.count("\n") == 1
    assert (done["budget"], done["lambda"], done["dtype"]) == (0.6, pytest.approx(3.0), "bf16")
    assert len(done["files"]) > 1 and all((here / "out" / file).is_file() for file in done["files"])
    assert json.loads((here / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_stays_behind_is_said_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "tiny-dpn" / "notes.txt").write_text("mine")
    assert main(["export", "--model", "tiny-dpn", "-o", "out", "--uncalibrated"]) == 0
    assert capsys.readouterr().err.count("notes.txt") == 1


def test_all_options_together(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quantize", "nf4", "--static", "keep,1x2,2x2,keep,exit", "--drop-unused", "--verify"]
    options += ["--max-shard-size", "200KB"]
    assert main(["export", "--model", "tiny-dpn", "-o", "out", *options]) == 0
    captured = capsys.readouterr()
    assert "fixed, keep,pool:1x2,pool:2x2,keep,exit" in captured.out and "nf4" in captured.out
    assert "tensors equal the checkpoint's, byte for byte" in captured.err and "Wrote out. " in captured.err
    assert main(["inspect", "out"]) == 0
    assert "static route keep,pool:1x2,pool:2x2,keep,exit" in capsys.readouterr().out
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 2
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_a_broken_value_stops_an_export_unless_told_not_to_look(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_calibration(here / "tiny-dpn")
    tensors = load_file(here / "tiny-dpn" / "dpe.safetensors")
    next(iter(tensors.values())).flat[0] = np.nan
    save_file(tensors, here / "tiny-dpn" / "dpe.safetensors")
    assert main(["export", "--model", "tiny-dpn", "-o", "out"]) == 3
    assert "dpe.safetensors: the tensor" in capsys.readouterr().err and not (here / "out").exists()
    assert main(["export", "--model", "tiny-dpn", "-o", "out", "--no-check-values"]) == 0
    capsys.readouterr()
    assert main(["export", "--model", "tiny-dpn", "-o", "out", "--no-check-values", "--force"]) == 0
    assert "Wrote out in place of an earlier one, which was calibrated on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "complaint"),
    [
        ("--model {source}", 3, "has no pyramid yet: run `dpn convert"),
        ("--model nothing", 3, "does not exist"),
        ("--model tiny-dpn --output taken", 2, "taken exists"),
        ("--model tiny-dpn --output taken --force", 2, "not written by dpn"),
        ("--model tiny-dpn --output tiny-dpn/inside", 2, "overlaps"),
        ("--model tiny-dpn --dtype int8", 2, "not one of bf16, fp16, fp32"),
        ("--model tiny-dpn --max-shard-size lots", 2, "not a size"),
        ("--model tiny-dpn --budget 0.5", 2, "not calibrated"),
        ("--model tiny-dpn --budget 1.5", 2, "1.5"),
        ("--model tiny-dpn --quantize nf", 2, "Did you mean 'nf4'?"),
        ("--model tiny-dpn --static 0,1", 2, "expected 5 experts, one for each site"),
        ("--model tiny-dpn --static 0,1,5x5,0,0", 2, "expected one of keep, pool:2x2, or 0 to 1"),
        ("--model tiny-dpn --static 0,0,0,0,0 --budget 0.5", 2, "give --static or --budget, not both"),
        ("", 2, "no current checkpoint"),
    ],
)
def test_faults(
    here: Path, tiny_llava: Path, capsys: pytest.CaptureFixture[str], args: str, code: int, complaint: str
) -> None:
    if "--budget 0.5" not in args:
        pretend_calibration(here / "tiny-dpn")
    (here / "taken").mkdir()
    (here / "taken" / "notes.txt").write_text("mine")
    before = sorted(path.relative_to(here) for path in here.rglob("*"))
    assert main(["export", *args.format(source=tiny_llava).split()]) == code
    captured = capsys.readouterr()
    assert complaint in captured.err and "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(path.relative_to(here) for path in here.rglob("*")) == before
