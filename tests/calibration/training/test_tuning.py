"""Calibrations that train: what they write, that a load and an export give the healed model, and the way back."""

import hashlib
import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from dpn_cli.calibration import calibrate as calibration
from dpn_cli.calibration import job
from dpn_cli.calibration.calibrate import calibrate
from dpn_cli.calibration.settings import healing_recipe
from dpn_cli.calibration.training import tuning
from dpn_cli.calibration.training.loop import TrainingReport
from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.lora import Lora
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.cli import main
from dpn_cli.conversion.convert import convert
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import CheckpointError, MissingExtraError, UsageError
from dpn_cli.exporting.export import export
from dpn_cli.exporting.options import ExportOptions
from dpn_cli.inference import adapter
from dpn_cli.inference.loading import load_model
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe, HealRecipe, PaperRecipe
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.runs import FEW, digests

HEAL = HealRecipe(method="lora", rank=2, steps=3, batch_size=2, gradient_accumulation=1, learning_rate=2e-2)
RECIPE = CalibrationRecipe.model_validate({**FEW, "budget": 0.7, "heal": HEAL})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures, of which the first eight have an answer, and a row of text."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(16):
        Image.fromarray(pixels.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": "a red circle"}]
        rows.append({"id": str(i), "image": f"{i:02}.png", "conversations": turns[: 2 if i < 8 else 1]})
    text = [{"from": "human", "value": "say one word"}, {"from": "gpt", "value": "green"}]
    rows.append({"id": "text", "conversations": text})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.fixture(scope="module")
def converted(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(str(tiny_llava), output=tmp_path_factory.mktemp("out") / "tiny-dpn").output


@pytest.fixture(scope="module")
def healed(converted: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healed") / "tiny-dpn"
    shutil.copytree(converted, folder)
    run(folder, data, RECIPE)
    return folder


def run(folder: Path, data: Path, recipe: CalibrationRecipe) -> Any:
    return calibrate(folder, DataOptions(str(data)), recipe)


def logits(model: Any, folder: Path, data: Path) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.open(data.parent / "03.png")
    inputs = processor(text="USER: <image>\nwhat is this ? ASSISTANT:", images=image, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def adapter_of(folder: Path) -> Path:
    """Where config.json says that the adapter is."""
    return folder / json.loads((folder / "config.json").read_text())["pyramid"]["calibration"]["adapter"]


def base_weights(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("model*.safetensors")}


def test_a_healed_checkpoint_keeps_its_base_and_notes_its_adapter(converted: Path, healed: Path) -> None:
    new = {str(path.relative_to(healed)) for path in healed.rglob("*") if path.is_file()}
    new -= {str(path.relative_to(converted)) for path in converted.rglob("*") if path.is_file()}
    adapter = adapter_of(healed)
    generation = adapter.parent.relative_to(healed)
    assert new == {
        f"{generation}/adapter/adapter_config.json", f"{generation}/adapter/adapter_model.safetensors",
        f"{generation}/dpe.safetensors", f"{generation}/model.safetensors.index.json",
        "calibration/report.json", "calibration/report.html",
    }  # fmt: skip
    assert base_weights(healed) == base_weights(converted) != {}
    record = json.loads((healed / "config.json").read_text())["pyramid"]["calibration"]
    assert healed / record["adapter"] == adapter
    assert record["heal"]["rank"] == 2
    assert record["training"]["steps"] == 3
    assert "paper" not in record


def test_a_load_is_healed_and_its_teacher_is_the_original(healed: Path, tiny_llava: Path, data: Path) -> None:
    stock = LlavaForConditionalGeneration.from_pretrained(tiny_llava).eval()
    model, plain = load_model(healed), load_model(healed, healed=False)
    for each in (model, plain):
        each.set_budget(1.0)
    expected = logits(stock, healed, data)
    assert torch.equal(logits(plain, healed, data), expected)
    with model.teacher():
        assert torch.equal(logits(model, healed, data), expected)
    assert not torch.allclose(logits(model, healed, data), expected, atol=1e-3)
    assert not any(parameter.requires_grad for name, parameter in plain.named_parameters() if ".lora_" in name)


def test_what_would_lose_the_adapter_is_refused_or_says_so(
    healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    handler = SimpleNamespace(level=0, handle=lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("transformers.dpn"), "handlers", [handler])
    model = load_model(healed)
    assert not said
    with pytest.raises(ValueError, match="carries the adapter of its healing: `dpn export` merges it"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    AutoModelForImageTextToText.from_pretrained(healed)
    assert [line[:57] for line in said] == ["This checkpoint was healed, and its adapter is not loaded"]


def test_the_adapter_is_off_in_one_thread_alone(healed: Path, data: Path) -> None:
    model, plain = load_model(healed), load_model(healed, healed=False)
    with_adapter = logits(model, healed, data)
    with model.teacher():
        original = logits(model, healed, data)
    with model.without_adapter(), ThreadPoolExecutor(1) as pool:
        twin = deepcopy(model)
        assert torch.equal(logits(model, healed, data), logits(plain, healed, data))
        for other in (model, twin):
            assert torch.equal(pool.submit(logits, other, healed, data).result(), with_adapter)
        assert torch.equal(logits(twin, healed, data), with_adapter), "a copy has no caller's settings"
    with twin.teacher():
        assert torch.equal(logits(twin, healed, data), original)
    assert torch.equal(logits(model, healed, data), with_adapter)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".lora_" in name)
    model.text_model.layers[4].mlp.down_proj.merge()
    with model.teacher():
        assert torch.allclose(logits(model, healed, data), original, atol=1e-4), "what was merged is taken out again"


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_an_export_holds_the_adapter_in_its_weights(
    healed: Path, data: Path, tmp_path: Path, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(load_model(healed), healed, data)
    done = export(healed, tmp_path / "out", ExportOptions(dtype=dtype, max_shard_size="100KB"))
    monkeypatch.setattr(adapter, "_peft", lambda: pytest.fail("an export needs no peft"))
    model = load_model(done.output)
    assert "adapter" not in json.loads((done.output / "config.json").read_text())["pyramid"]["calibration"]
    assert not (done.output / "calibration").exists()
    changed = logits(model, healed, data).float()
    if dtype is None:
        assert torch.allclose(changed, expected, atol=1e-3)
    targets = Lora.open(adapter_of(healed)).targets
    before = load_model(healed, healed=False).state_dict()
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, before[name].to(tensor.dtype))
        assert same == (name not in targets), name


def test_merging_is_what_peft_does(healed: Path) -> None:
    model = load_model(healed)
    layer = model.text_model.layers[4].mlp.down_proj
    lora = Lora.open(adapter_of(healed))
    base = layer.base_layer.weight.detach()
    merged = lora.merged("model.language_model.layers.4.mlp.down_proj.weight", base)
    assert torch.allclose(merged, base + layer.get_delta_weight("default"), atol=1e-6)
    assert not torch.allclose(merged, base, atol=1e-6)


def test_calibrating_again_without_healing_is_the_way_back(
    converted: Path, healed: Path, data: Path, tmp_path: Path
) -> None:
    again, never = tmp_path / "again", tmp_path / "never"
    shutil.copytree(healed, again)
    shutil.copytree(converted, never)
    recipe = RECIPE.model_copy(update={"heal": HealRecipe()})
    first, second = run(again, data, recipe), run(never, data, recipe)
    assert not list(again.rglob("adapter"))
    assert first.full.distortion == second.full.distortion == 0
    assert not load_model(again).is_adapted


def test_healing_afterwards_is_healing_at_once(
    converted: Path, healed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny-dpn"
    shutil.copytree(converted, folder)
    recipe = RECIPE.model_copy(update={"heal": HealRecipe()})
    run(folder, data, recipe)
    before = load_model(folder)
    monkeypatch.setattr(calibration, "learn_predictors", pytest.fail)
    calibrate(folder, DataOptions(str(data)), RECIPE, only="heal")
    after, at_once = load_model(folder), load_model(healed)
    assert (after.pyramid.sites, after.pyramid.routes) == (before.pyramid.sites, before.pyramid.routes)
    assert after.pyramid.budgets == at_once.pyramid.budgets
    expected = at_once.state_dict()
    assert after.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.state_dict().items())
    with pytest.raises(UsageError, match="healed already"):
        calibrate(folder, DataOptions(str(data)), RECIPE, only="heal")


def test_where_healing_afterwards_does_not_help_the_checkpoint_stays(
    converted: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "tiny-dpn"
    shutil.copytree(converted, folder)
    run(folder, data, RECIPE.model_copy(update={"heal": HealRecipe()}))
    before = digests(folder)
    monkeypatch.setattr(tuning, "heal", lambda *args, **options: TrainingReport(0, [0.0]))
    assert calibrate(folder, DataOptions(str(data)), RECIPE, only="heal") is None
    line = ["calibrate", "--model", str(folder), "--data", str(data), "--heal-only", "--json"]
    assert main(line) == 2
    assert "healing replaces the routers that were calibrated on" in capsys.readouterr().err
    assert main([*line, "--force"]) == 0
    assert digests(folder) == before
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((folder / "calibration" / "report.json").read_text())


def test_healing_afterwards_keeps_the_budget_and_the_samples(converted: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-dpn"
    shutil.copytree(converted, folder)
    run(folder, data, RECIPE.model_copy(update={"heal": HealRecipe(), "seed": 3}))
    recipe = healing_recipe(folder, (), {})
    assert recipe.budget == pytest.approx(0.7, abs=1e-5)
    assert (recipe.samples, recipe.seed, recipe.heal.method) == (RECIPE.samples, 3, "lora")
    assert healing_recipe(folder, ("calibration.seed=4",), {"budget": 0.8}).model_dump()["budget"] == 0.8
    assert healing_recipe(folder, ("calibration.seed=4",), {}).seed == 4


def test_held_out_samples_are_not_learned_from_and_answered_texts_are(
    converted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(converted, tmp_path / "tiny-dpn")
    seen: dict[str, bool] = {}

    def spy(model: Any, examples: Any, has_labels: Any, *args: Any, **options: Any) -> TrainingReport:
        seen.update({sample.id: labelled for sample, labelled in zip(examples.samples, has_labels, strict=True)})
        return TrainingReport(0, [0.0])

    monkeypatch.setattr(tuning, "heal", spy)
    report = run(tmp_path / "tiny-dpn", data, RECIPE)
    assert report.settings["held_out"] == 4
    assert len(seen) == 13
    assert seen.pop("text")
    assert {labelled == (int(i) < 8) for i, labelled in seen.items()} == {True}


def test_samples_that_only_healing_reads_come_in_addition(
    converted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(converted, tmp_path / "tiny-dpn")
    seen: list[int] = []

    def spy(model: Any, examples: Any, *args: Any, **options: Any) -> TrainingReport:
        seen.append(len(examples))
        return TrainingReport(0, [0.0])

    monkeypatch.setattr(tuning, "heal", spy)
    monkeypatch.setattr(job, "MIN_SAMPLES", 4)
    heal = HEAL.model_copy(update={"samples": 14})
    recipe = RECIPE.model_copy(update={"samples": 8})
    report = run(tmp_path / "tiny-dpn", data, recipe.model_copy(update={"heal": heal}))
    assert seen in ([14 - 2], [14 - 2 + 1])  # the row of text is met on the way, or not
    plain = run(tmp_path / "tiny-dpn", data, recipe.model_copy(update={"heal": HealRecipe()}))
    assert report.settings["held_out"] == plain.settings["held_out"] == 2
    ids = [{case.sample.id for case in each.cases} for each in (report, plain)]
    assert ids[0] == ids[1]  # the same ones are held out
    assert report.settings["data_digest"] == plain.settings["data_digest"]  # by which eval knows them again


def test_the_papers_objective_trains_routers_and_adapter(tiny_llava: Path, data: Path, tmp_path: Path) -> None:
    recipe = load_recipe("llava-1.5-7b-paper")
    folder = convert(str(tiny_llava), recipe, tmp_path / "tiny-dpn").output
    steps: dict[str, Any] = {"steps": 2, "batch_size": 2, "gradient_accumulation": 1}
    paper = PaperRecipe(**steps, learning_rate=1e-2, train="lora", loss="kl")
    changes = {
        "paper": paper,
        "samples": 16,
        "holdout": 0.25,
        "answer_tokens": 3,
        "budget": 0.9,
        "heal": HealRecipe(rank=2),
    }
    report = run(folder, data, recipe.calibration.model_copy(update=changes))
    assert report.settings["training"]["steps"] == 2
    assert report.settings["held_out"] == 4
    model = load_model(folder)
    assert model.is_adapted
    assert all(router.head.weight.abs().sum() > 0 for router in model.text_model.routers)


def test_without_peft_healing_names_the_extra(
    converted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    shutil.copytree(converted, tmp_path / "tiny-dpn")
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("dpn_cli.calibration.job.read_samples", pytest.fail)  # it is refused first
    with pytest.raises(MissingExtraError, match=r"dpn-cli\[heal\]"):
        run(tmp_path / "tiny-dpn", data, RECIPE)


def test_an_adapter_that_is_gone_or_strange_is_an_error(healed: Path, tmp_path: Path) -> None:
    shutil.copytree(healed, tmp_path / "tiny-dpn")
    config = adapter_of(tmp_path / "tiny-dpn") / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(CheckpointError, match="an adapter that is not plain LoRA"):
        export(tmp_path / "tiny-dpn", tmp_path / "out")
    config.unlink()
    for act in (load_model, lambda folder: export(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="is missing, yet the checkpoint was healed"):
            act(tmp_path / "tiny-dpn")


def test_patterns_in_an_adapters_file_are_not_looked_at(healed: Path, tmp_path: Path) -> None:
    shutil.copytree(healed, tmp_path / "tiny-dpn")
    path = adapter_of(tmp_path / "tiny-dpn") / "adapter_config.json"
    config, slow = read_json(path), r"(\w+\.?)+\d\d"  # takes for ever on names of layers
    write_json(path, config | {"target_modules": slow, "rank_pattern": {slow: 10**9}, "layers_pattern": slow})
    assert load_model(tmp_path / "tiny-dpn").is_adapted
    write_json(path, config | {"r": 10**9})
    with pytest.raises(CheckpointError, match="whose rank is not its r"):
        load_model(tmp_path / "tiny-dpn")
