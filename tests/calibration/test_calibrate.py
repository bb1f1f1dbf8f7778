"""Calibration of a converted checkpoint as one call: what it writes, what it leaves alone."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dpn_cli.calibration.calibrate import calibrate
from dpn_cli.calibration.settings import candidates
from dpn_cli.checkpoint.headers import INDEX_FILE
from dpn_cli.checkpoint.inspection import inspect_checkpoint
from dpn_cli.cli import main
from dpn_cli.conversion.convert import convert
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import DataError, RecipeError, UsageError
from dpn_cli.exporting.export import export
from dpn_cli.inference.loading import load_model
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe, PredictorRecipe, SurveyRecipe
from dpn_cli.reporter import Reporter
from tests.pyramids import prompt
from tests.runs import FEW, digests, noise_pictures

SURVEY = SurveyRecipe(samples=2, routes=6, width=1)
RECIPE = CalibrationRecipe.model_validate({**FEW, "budget": 0.6, "survey": SURVEY})
QUICK = CalibrationRecipe.model_validate({**FEW, "budget": 0.6})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_pictures(tmp_path_factory.mktemp("pictures"), RECIPE.samples)


@pytest.fixture(scope="module")
def converted(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(str(tiny_llava), output=tmp_path_factory.mktemp("out") / "tiny-dpn").output


@pytest.fixture(scope="module")
def calibrated(converted: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "tiny-dpn"
    shutil.copytree(converted, folder)
    run(folder, data)
    return folder


def run(folder: Path, data: Path, recipe: CalibrationRecipe = RECIPE) -> Any:
    @contextmanager
    def counted(description: str, total: int) -> Iterator[Any]:
        done = []
        yield done.append
        assert sum(done) == total, f"{description} must report all of its steps"

    return calibrate(folder, DataOptions(str(data)), recipe, Reporter(progress=counted))


def test_only_routers_settings_and_report_change(converted: Path, calibrated: Path) -> None:
    before, after = digests(converted), digests(calibrated)
    [generation] = (calibrated / "calibration" / "generations").iterdir()
    made = {f"{generation.relative_to(calibrated)}/{name}" for name in ("dpe.safetensors", INDEX_FILE)}
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {"config.json", "calibration/report.json", "calibration/report.html", *made}
    assert before.keys() - after.keys() == {"dpe.safetensors", INDEX_FILE}


def test_what_inspect_shows_agrees_with_the_budget_table(calibrated: Path) -> None:
    found = inspect_checkpoint(calibrated)
    assert found.sample_from == "calibration"
    assert found.routes[-1].fraction == pytest.approx(found.pyramid.budgets[-1].fraction, abs=0.01)


def test_the_report_and_the_config_agree_with_the_model(calibrated: Path) -> None:
    report = json.loads((calibrated / "calibration" / "report.json").read_text())
    model = load_model(calibrated)
    assert model.pyramid.trade_off == report["trade_off"]
    assert [list(vars(b).values()) for b in model.pyramid.budgets] == [list(b.values()) for b in report["budgets"]]
    assert report["routed"]["fraction"] == pytest.approx(0.6, abs=0.1)  # four held-out samples are coarse
    assert report["settings"]["held_out"] == 4
    assert len(report["worst"]) == 4


def test_calibrated_with_budget_one_equals_stock(calibrated: Path, tiny_llava: Path, data: Path) -> None:
    stock, model = LlavaForConditionalGeneration.from_pretrained(tiny_llava).eval(), load_model(calibrated)
    processor = AutoProcessor.from_pretrained(calibrated)
    image = Image.open(data / "00.png")
    inputs = processor(text="USER: <image>\nwhat is this ? ASSISTANT:", images=image, return_tensors="pt")
    with torch.no_grad():
        expected = stock(**inputs).logits
        assert not torch.equal(model(**inputs).logits, expected)
        model.set_budget(1.0)
        assert torch.equal(model(**inputs).logits, expected)
        model.set_budget(None)
        assert torch.equal(model(**inputs).logits, expected)


def test_the_weights_of_a_calibrated_folder_may_stay_on_disk(calibrated: Path, tmp_path: Path) -> None:
    inputs, whole = prompt(1, 3, 5, seed=0), load_model(calibrated)
    parts = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    placement: Any = {"device_map": parts | {"model.language_model": "disk"}, "offload_folder": tmp_path}
    with torch.no_grad():
        assert torch.equal(load_model(calibrated, **placement)(**inputs).logits, whole(**inputs).logits)


def test_a_budget_set_later_is_saved_with_the_model(calibrated: Path, tmp_path: Path) -> None:
    model = load_model(calibrated)
    cheapest = model.pyramid.budgets[-1].fraction
    model.set_budget(cheapest)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).pyramid.trade_off == model.pyramid.budgets[-1].trade_off


@pytest.mark.slow
def test_the_same_seed_gives_the_same_routers(converted: Path, calibrated: Path, data: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(converted, again)
    run(again, data)
    assert digests(again) == digests(calibrated)


def test_a_budget_out_of_reach_is_refused_before_any_work(converted: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-dpn"
    shutil.copytree(converted, folder)
    before = digests(folder)
    healing = RECIPE.heal.model_copy(update={"method": "lora"})
    with pytest.raises(UsageError, match=r"this pyramid's cheapest is 0\.\d+ on these data") as caught:
        run(folder, data, QUICK.model_copy(update={"budget": 0.01, "heal": healing}))
    assert digests(folder) == before
    assert not (folder / "calibration").exists(), "nothing has been asked, healed or measured"
    cheapest = float(str(caught.value).split("cheapest is ")[1].split()[0])
    run(folder, data, QUICK.model_copy(update={"budget": cheapest + 0.001}))
    pyramid = load_model(folder).pyramid
    assert pyramid.trade_off == pytest.approx(pyramid.budgets[-1].trade_off, rel=0.01)
    assert pyramid.budgets[-1].fraction == pytest.approx(cheapest, abs=0.005), "the survey keeps what reaches it"


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with long questions: pooling saves less of them."""
    folder = noise_pictures(tmp_path_factory.mktemp("others"), 8)
    rows = [{"image": f"{i:02}.png", "question": "what " * (20 + 6 * i), "answer": "red circle"} for i in range(8)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def evaluated(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, float], str]:
    """Return what was asked for and spent, and what was said."""
    assert main(["eval", "--model", str(folder), "--data", str(data), "--max-new-tokens", "1", "--json"]) == 0
    captured = capsys.readouterr()
    [spending] = json.loads(captured.out)["budgets"]
    return spending, captured.err


def test_budgets_are_solved_again_on_data_that_overspend(
    calibrated: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny-dpn"
    shutil.copytree(calibrated, folder)
    before, said = evaluated(folder, others, capsys)
    assert before["spent"] > before["asked"] + 0.05
    command = said[said.index("dpn calibrate") :].splitlines()[0]
    assert command.endswith("--budgets-only")
    old = load_model(folder).pyramid.calibration
    assert main(command.split()[1:]) == 0
    capsys.readouterr()
    pyramid = load_model(folder).pyramid
    assert pyramid.budget == pytest.approx(before["asked"], abs=1e-5), "what it was set to"
    after, said = evaluated(folder, others, capsys)
    assert after["spent"] == pytest.approx(after["asked"], abs=0.02)
    assert "was not met" not in said
    assert "calibrated on these very samples" not in said, "the routers were not"
    weights = [{k: v for k, v in digests(each).items() if k.endswith(".safetensors")} for each in (folder, calibrated)]
    assert weights[0] == weights[1]
    kept = {key: old[key] for key in ("data", "data_digest", "epochs", "training")}
    assert kept.items() <= pyramid.calibration.items()
    assert (pyramid.calibration["held_out"], pyramid.calibration["budgets_solved_on"]["data"]) == (8, str(others))
    cheapest = inspect_checkpoint(folder).routes[-1]
    assert cheapest.fraction == pytest.approx(pyramid.budgets[-1].fraction, abs=0.01)


def test_an_export_is_solved_again_too(calibrated: Path, others: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export(calibrated, folder)
    before = digests(folder)
    line = ["calibrate", "--model", str(folder), "--data", str(others), "--budgets-only", "--samples", "4"]
    results = {"config.json", "calibration/report.json", "calibration/report.html"}
    assert main([*line, "--budget", "0.01"]) == 2, "a budget that is asked for must be in reach"
    assert digests(folder) == before
    assert main([*line, "--budget", "0.7"]) == 0
    after = digests(folder)
    changed = {name for name, digest in after.items() if before.get(name) != digest}
    assert changed == {*results, "calibration/earlier/1/config.json"}, "an export has no report yet"
    assert after["calibration/earlier/1/config.json"] == before["config.json"], "it can be put back"
    assert 0.6999 < load_model(folder).pyramid.budget <= 0.7, "no λ spends more of so few samples"
    assert main([*line, "--budget", "0.8"]) == 0
    kept = {name: digests(folder)[f"calibration/earlier/2/{Path(name).name}"] for name in results}
    assert kept == {name: after[name] for name in results}


def test_only_calibrated_routers_can_be_kept(converted: Path, others: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["calibrate", "--model", str(converted), "--data", str(others)]
    for only in ("--budgets-only", "--heal-only"):
        assert main([*line, only]) == 2
        assert f"no calibrated routers that could be kept: calibrate without {only}" in capsys.readouterr().err
    assert main([*line, "--budgets-only", "--heal", "lora"]) == 2
    assert "leave out --heal" in capsys.readouterr().err


def test_measurements_outlive_a_failure_and_go_when_all_is_done(
    converted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpn_cli.calibration import calibrate as calibration
    from dpn_cli.calibration import rollout

    folder = tmp_path / "tiny-dpn"
    shutil.copytree(converted, folder)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(calibration, "budget_table", None)
        run(folder, data, QUICK)
    assert list((folder / "calibration" / "state").glob("batch-*"))
    with pytest.raises(UsageError, match="other values of seed"):
        run(folder, data, QUICK.model_copy(update={"seed": 1}))
    monkeypatch.setattr(rollout, "_measure_batch", None)  # all that is needed has been measured
    run(folder, data, QUICK)
    assert not (folder / "calibration" / "state").exists()


def test_too_few_samples(converted: Path, data: Path, tmp_path: Path) -> None:
    predicted = RECIPE.model_copy(update={"predictors": PredictorRecipe(samples=64)})
    for recipe in (RECIPE, predicted):
        with pytest.raises(UsageError, match=r"--samples 8 .*: a calibration needs 16 or more"):
            run(converted, data, recipe.model_copy(update={"samples": 8}))
        with pytest.raises(DataError, match="has 8 samples with an image, calibration needs 16"):
            run(converted, noise_pictures(tmp_path, 8), recipe)


def test_interrupted_writing_leaves_the_old_files(
    converted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpn_cli.calibration import store

    folder = tmp_path / "tiny-dpn"
    shutil.copytree(converted, folder)
    before = digests(folder)

    def full_disk(tensors: Any, metadata: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(folder, data, QUICK)
    shutil.rmtree(folder / "calibration" / "state")
    assert digests(folder) == before


def test_the_report_names_the_routes_that_the_checkpoint_offers(calibrated: Path) -> None:
    pyramid = inspect_checkpoint(calibrated).pyramid
    tried = json.loads((calibrated / "calibration" / "report.json").read_text())["tried"]
    recipe = CalibrationRecipe()
    candidates_of = candidates(calibrated, pyramid, 8, recipe.survey)
    assert candidates_of is not None and pyramid.routes is not None
    chosen = {each["experts"] for each in tried if each["chosen"]}
    layers = [site.after_layer for site in candidates_of.sites]

    def in_full(route: Any) -> str:
        taken = dict(zip((site.after_layer for site in pyramid.sites), pyramid.experts(route), strict=True))
        return ",".join(str(taken.get(layer, "keep")) for layer in layers)

    assert {in_full(route) for route in pyramid.routes} == chosen
    assert len(tried) > len(chosen) > 4
    assert len(pyramid.mean_losses) == len(pyramid.routes)


def test_the_kinds_of_experts_can_be_named(converted: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-dpn"
    shutil.copytree(converted, folder)
    pooling = SURVEY.model_copy(update={"experts": ("pool",), "routes": 5})
    run(folder, data, QUICK.model_copy(update={"survey": pooling}))
    found = inspect_checkpoint(folder).pyramid
    assert {expert.kind for site in found.sites for expert in site.experts} == {"keep", "pool"}
    assert found.num_routes <= 5 and load_model(folder).pyramid == found
    every = QUICK.model_copy(update={"survey": SurveyRecipe(samples=2, routes=3, width=1)})
    again = run(folder, data, every)  # from the recipe's candidates, not from what an earlier survey has left of them
    assert {kind for each in again.tried for kind in each.experts.split(",")} > {"keep", "pool:1x2"}
    for kinds, message in (
        (("pool", "stride"), r"no site of .* kinds stride: choose from pool, "),
        (("keep",), "besides"),
    ):
        with pytest.raises(RecipeError, match=message):
            run(folder, data, RECIPE.model_copy(update={"survey": SurveyRecipe(experts=kinds)}))
