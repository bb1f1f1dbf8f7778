"""What a model is computed in: float32 where a CPU only emulates the checkpoint's dtype, and what is written stays."""

import importlib
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.filesize import decimal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpn_cli import cli
from dpn_cli.calibration import calibrate as calibration
from dpn_cli.checkpoint.headers import BITS, DTYPES, FLOATS, read_json
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.conversion.convert import convert
from dpn_cli.data.encoding import collate, encode
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.exporting.export import export
from dpn_cli.exporting.options import ExportOptions
from dpn_cli.inference import dtypes
from dpn_cli.inference.dtypes import available_memory, compute_dtype
from dpn_cli.inference.generation import greedy_answers
from dpn_cli.inference.loading import load_model, load_processor
from dpn_cli.inference.scoring import answer_log_probs, divergence
from tests.runs import digests, noise_pictures, options

SAMPLES = 16
LIGHT = ["--max-new-tokens", "2"]
QUICK = ["--experts", "exit", *options({"epochs": 1, "answer_tokens": 2, "survey": {"samples": 2, "routes": 3}})]


@pytest.fixture(scope="module")
def half(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return `make(dtype) -> Path`: a converted tiny LLaVA that is stored in a dtype, a folder of one's own."""

    @cache
    def converted(dtype: str) -> Path:
        source = Path(shutil.copytree(tiny_llava, tmp_path_factory.mktemp(dtype) / "tiny"))
        tensors = load_file(source / "model.safetensors")
        cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
        save_file(cast, source / "model.safetensors", metadata={"format": "pt"})
        write_json(source / "config.json", read_json(source / "config.json") | {"dtype": dtype})
        return convert(str(source), output=source.with_name("tiny-dpn")).output

    def make(dtype: str) -> Path:
        return Path(shutil.copytree(converted(dtype), tmp_path_factory.mktemp(dtype) / "tiny-dpn"))

    return make


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return `be(slowdown, free)`: the machine's CPU and memory seem so from then on."""

    def be(slowdown: float, free: float = 1e12) -> None:
        monkeypatch.setattr(dtypes, "slowdown", lambda dtype: slowdown)
        monkeypatch.setattr(dtypes, "available_memory", lambda: int(free))

    return be


def ask(folder: Path, asked: str = "auto", **settings: Any) -> tuple[str, list[str]]:
    """Return the dtype and what is said."""
    said: list[str] = []
    checkpoint, layout, _ = open_converted(folder)
    return compute_dtype(checkpoint, layout, asked, settings.pop("device", "cpu"), said.append, **settings), said


def sizes(folder: Path) -> tuple[int, int]:
    tensors = open_converted(folder)[0].tensors.values()
    wide = sum(tensor.num_values * 4 if tensor.dtype in FLOATS else tensor.nbytes for tensor in tensors)
    return sum(tensor.num_values * BITS[tensor.dtype] // 8 for tensor in tensors), wide


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_an_emulated_dtype_is_widened_where_memory_allows(
    half: Callable[[str], Path], machine: Callable[..., None], stored: str
) -> None:
    folder = half(stored)
    own, wide = sizes(folder)
    machine(9.5)
    dtype, [said] = ask(folder)
    assert dtype == "float32"
    keeping = {"bfloat16": "bf16", "float16": "fp16"}[stored]
    for part in (stored, "9.5 times", decimal(own), decimal(wide), f"--dtype {keeping}"):
        assert part in said
    machine(1.1)
    assert ask(folder) == ("auto", [])
    machine(9.5, free=wide)
    dtype, [said] = ask(folder)
    assert dtype == "auto"
    assert f"{decimal(wide)} are free: computing in {stored}" in said
    machine(9.5, free=3 * wide)
    assert ask(folder)[0] == "float32" and ask(folder, copies=3)[0] == "auto", "three processes load three models"


def test_what_is_chosen_what_is_wide_and_a_gpu_are_left_as_they_are(
    half: Callable[[str], Path], tiny_llava: Path, tmp_path: Path, machine: Callable[..., None]
) -> None:
    machine(9.5)
    folder = half("bfloat16")
    assert [ask(folder, name) for name in DTYPES] == [("bfloat16", []), ("float16", []), ("float32", [])]
    assert ask(folder, device="cuda") == ("auto", [])
    assert ask(convert(str(tiny_llava), output=tmp_path / "wide").output) == ("auto", [])


def test_a_model_that_is_quantised_on_loading_counts_as_small_as_it_is(
    half: Callable[[str], Path], machine: Callable[..., None]
) -> None:
    folder = half("bfloat16")
    linear = [t for t in open_converted(folder)[0].tensors.values() if ".layers." in t.name and len(t.shape) == 2]
    decoder = sum(t.num_values for t in linear if t.name.startswith("language_model.model."))
    own, wide = sizes(folder)
    for load_in, bits in (("4bit", 4), ("8bit", 8)):
        machine(9.5)
        [said] = ask(folder, load_in=load_in)[1]
        for size, stored in ((own, 2), (wide, 4)):
            assert decimal(size - decoder * stored + decoder * bits // 8) in said


@pytest.mark.parametrize("command", ["run", "eval", "bench", pytest.param("calibrate", marks=pytest.mark.slow)])
def test_every_command_that_runs_a_model_chooses_and_says_it_once(
    half: Callable[[str], Path],
    machine: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = noise_pictures(tmp_path, SAMPLES)
    folder = half("bfloat16")
    line = {
        "run": ["--image", str(data / "00.png"), "what is this ?", *LIGHT],
        "eval": ["--data", str(data), "--samples", "2", *LIGHT],
        "bench": ["--rounds", "1", "--new-tokens", "1", "--text-tokens", "4", "--route", "keep,keep,2x2,keep,exit"],
        "calibrate": ["--data", str(data), "--force", *QUICK],
    }[command]
    loaded: list[torch.dtype] = []
    module = {"run": "inference.loading", "eval": "evaluation.run", "bench": "evaluation.bench",
              "calibrate": "inference.quantised"}[command]  # fmt: skip
    note_dtypes(f"dpn_cli.{module}", loaded, monkeypatch)
    machine(9.5)
    before = {path: digest for path, digest in digests(folder).items() if path.startswith("model-")}
    assert cli.main([command, "--model", str(folder), *line]) == 0
    said = capsys.readouterr().err
    assert said.count("emulates bfloat16") == 1 and said.count("--dtype bf16") == 1
    assert cli.main([command, "--model", str(folder), *line, "--dtype", "bf16"]) == 0
    assert "emulates" not in capsys.readouterr().err
    assert loaded == [torch.float32, torch.bfloat16]
    assert before.items() <= digests(folder).items()
    assert read_json(folder / "config.json")["dtype"] == "bfloat16"
    for file in folder.rglob("dpe.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F32"}  # noqa: SIM118


def note_dtypes(module: str, loaded: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note the dtype of every model that a module loads."""
    place = importlib.import_module(module)
    real = place.load_opened

    def note(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        loaded.append(model.dtype)
        return model

    monkeypatch.setattr(place, "load_opened", note)


def test_a_calibration_goes_on_on_a_machine_with_another_fast_dtype(
    half: Callable[[str], Path],
    machine: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = half("bfloat16")
    data = noise_pictures(tmp_path, SAMPLES)
    line = ["calibrate", "--model", str(folder), "--data", str(data), *QUICK]
    machine(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "fit_routers", lambda *args: raise_interrupt())
        assert cli.main(line) == 130
    capsys.readouterr()
    machine(9.5)
    assert cli.main([*line, "--dtype", "bf16"]) == 2
    assert "other values of dtype:" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "fit_routers", lambda *args: raise_interrupt())
        patch.setattr("dpn_cli.calibration.rollout._measure_batch", None)  # nothing is measured again
        assert cli.main(line) == 130
    assert re.search(r"threads?, float32\n", capsys.readouterr().err)


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def test_the_answers_are_the_same_in_float32_and_bfloat16(tmp_path: Path) -> None:
    folder = convert("demo", output=tmp_path / "demo-dpn").output
    samples = load_data(DataOptions("demo"), split="heldout", limit=4).samples
    processor = load_processor(folder)
    answers, log_probs = [], []
    for dtype in ("bfloat16", "float32"):
        model = load_model(folder, dtype=dtype)
        assert model.dtype == getattr(torch, dtype)
        answers.append(greedy_answers(model, processor, samples, 4, 8))
        examples = [encode(sample, processor, 8) for sample in samples]
        with torch.inference_mode():
            log_probs.append(answer_log_probs(model, collate(examples, processor.tokenizer.pad_token_id)))
    assert answers[0] == answers[1]
    assert divergence(*log_probs, temperature=1).max() < 0.02  # nats


def test_a_quantised_export_computes_in_the_dtype_that_is_asked_for(
    half: Callable[[str], Path], tmp_path: Path
) -> None:
    export(half("bfloat16"), tmp_path / "out", ExportOptions(quantize="nf4", uncalibrated=True))
    for dtype in ("auto", "float32"):
        model = load_model(tmp_path / "out", dtype=dtype)
        kinds = {module.compute_dtype for module in model.modules() if type(module).__name__ == "Linear4bit"}
        assert kinds == {model.dtype} == {torch.bfloat16 if dtype == "auto" else torch.float32}


@pytest.mark.parametrize(
    "names", [("memory.max", "memory.current", "inactive_file"),
              ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file")]
)  # fmt: skip
def test_a_container_has_as_much_memory_as_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str]
) -> None:
    limit, use, droppable = names
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(dtypes, "_SYSTEM", tmp_path)
    monkeypatch.setattr(dtypes, "_MEMINFO", meminfo)
    meminfo.write_text("MemTotal:  900 kB\nMemFree:  1 kB\nMemAvailable:  600 kB\n")
    assert available_memory() == 600 * 1024
    (tmp_path / use).parent.mkdir(exist_ok=True)
    for path, text in ((limit, "5000"), (use, "3000")):
        (tmp_path / path).write_text(text)
    (tmp_path / use).with_name("memory.stat").write_text(f"cache 9\n{droppable} 500\n")
    assert available_memory() == 5000 - 3000 + 500
    (tmp_path / limit).write_text("max")
    assert available_memory() == 600 * 1024
