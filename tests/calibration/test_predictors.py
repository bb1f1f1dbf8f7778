"""Predictors: they learn from what stock transformers' attention is, and stay with the checkpoint."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpn_cli.calibration import predictors as stage
from dpn_cli.calibration.calibrate import calibrate
from dpn_cli.calibration.predictors import Watched, fit_predictor, watch_attention
from dpn_cli.calibration.settings import budgets_recipe, calibration_recipe
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.cli import main
from dpn_cli.conversion.convert import convert
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import UsageError
from dpn_cli.exporting.export import export
from dpn_cli.exporting.options import ExportOptions
from dpn_cli.inference.loading import load_model
from dpn_cli.modeling.predictors import PREDICTORS, new_predictors
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.experts import KEEP, KINDS, Expert
from dpn_cli.pyramid.recipe_files import load_recipe
from dpn_cli.reporter import Reporter
from tests.calibration.test_rollout import examples
from tests.elsewhere import run_elsewhere
from tests.pyramids import IMAGE, prompt
from tests.runs import FEW, noise_pictures

FORESEEN = ("predicted:0.25", "guided:0.25")
PREDICTED = (
    "pyramid.sites=[{after: 0, experts: [keep, 'predicted:0.25', 'guided:0.25']}]",
    "pyramid.routes=['predicted:0.25', 'guided:0.25']",
)
RECIPE = {**FEW, "budget": 0.6, "survey": {}, "predictors": {"samples": 16, "epochs": 2}}


def with_predictor(make_pair: Callable[..., tuple[Any, Any]], **settings: Any) -> tuple[Any, Any]:
    site = Site(-1, (KEEP, Expert("predicted", 0.25)))
    return make_pair(sites=(site,), static_route=(1,), **settings)


def test_what_it_learns_is_the_attention_of_the_stock_model(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean over the layers of the largest attention of any head and any text token after the image."""
    stock, model = with_predictor(make_pair, attn="eager")
    monkeypatch.setattr(stage, "TOKENS", 1000)
    samples = examples()
    together = watch_attention(model, samples, [0], pad=3)
    for row, sample in enumerate(samples):
        inputs = {"input_ids": sample.input_ids[None], "pixel_values": sample.visual["pixel_values"]}
        with torch.no_grad():
            attention = torch.stack(stock(**inputs, output_attentions=True).attentions)[:, 0]
        is_visual = sample.input_ids == IMAGE
        first = int(is_visual.nonzero()[0])
        readers = torch.arange(first, len(is_visual))[~is_visual[first:]]
        paid = attention[:, :, readers][..., is_visual].amax((1, 2)).mean(0)
        found = together["attention"][row]
        assert int((found > 0).sum()) == int(is_visual.sum()), "of the others there is none"
        assert torch.allclose(found[found > 0].sort().values, (paid / paid.sum()).sort().values, atol=1e-5)


def test_of_large_images_every_token_is_learned_from_in_some_batch(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In runs of neighbours, so that a guide sees what stands beside a token."""
    _, model = with_predictor(make_pair)
    monkeypatch.setattr(stage, "TOKENS", 30)
    [sample, *_] = examples()
    seen = set()
    for seed in range(80):
        coords = watch_attention(model, [sample], [0], pad=3, seed=seed)["coords"][0]
        assert len(coords) == 30
        places = sorted(map(tuple, coords.tolist()))
        numbers = [12 * row + column for _, row, column in places]
        assert numbers == list(range(numbers[0], numbers[0] + 30))
        seen |= set(places)
    assert len(seen) > 140


def test_every_kind_that_needs_a_predictor_has_one() -> None:
    assert PREDICTORS.keys() == {name for name, kind in KINDS.items() if kind.predictor_tensors}


@pytest.mark.parametrize("kind", PREDICTORS)
def test_a_predictor_learns_to_find_what_a_word_asks_for(kind: str) -> None:
    """The token that is alike to the second word gets all attention; other words, and how many there are, differ."""
    torch.manual_seed(0)
    words = torch.randn(6, 32)

    def piece(seed: int) -> Watched:
        generator = torch.Generator().manual_seed(seed)
        asked = torch.randint(0, 6, (16,), generator=generator)
        order = torch.stack([torch.randperm(6, generator=generator) for _ in range(16)])
        text = torch.stack([words[asked], torch.randn(16, 32, generator=generator)], dim=1)
        is_text = torch.tensor([[True, i % 2 == 0] for i in range(16)])
        attention = (order == asked[:, None]).float() * 0.95 + 0.0125
        parts = {"0.tokens": -words[order], "0.text": text, "0.is_text": is_text, "attention": attention}
        return parts | {"coords": torch.zeros(16, 6, 3)}

    predictor = fitted(kind, 16, piece, epochs=15)
    unseen = piece(99)
    with torch.no_grad():
        scores = predictor(*(unseen[name] for name in ("0.tokens", "coords", "0.text", "0.is_text")))
    assert (scores.argmax(1) == unseen["attention"].argmax(1)).float().mean() > 0.9
    assert not any(parameter.requires_grad for parameter in predictor.parameters())


def test_a_guide_finds_what_stands_beside_a_thing() -> None:
    """Tokens say which one is the thing; to its right is what is asked for, and nothing else tells it from others."""

    def piece(seed: int) -> Watched:
        generator = torch.Generator().manual_seed(seed)
        thing = torch.randint(0, 5, (32,), generator=generator)
        tokens = torch.randn(32, 6, 32, generator=generator)
        tokens[torch.arange(32), thing, :4] += 6
        attention = torch.nn.functional.one_hot(thing + 1, 6) * 0.95 + 0.0083
        coords = torch.stack(torch.meshgrid(torch.zeros(1), torch.zeros(1), torch.arange(6.0), indexing="ij"), -1)
        text, is_text = torch.zeros(32, 1, 32), torch.ones(32, 1).bool()
        parts = {"0.tokens": tokens, "0.text": text, "0.is_text": is_text, "attention": attention}
        return parts | {"coords": coords.reshape(1, 6, 3).expand(32, -1, -1)}

    torch.manual_seed(0)
    unseen = piece(99)
    for kind, finds in (("predicted", False), ("guided", True)):
        predictor = fitted(kind, 16, piece, epochs=12)
        with torch.no_grad():
            scores = predictor(*(unseen[name] for name in ("0.tokens", "coords", "0.text", "0.is_text")))
        right = (scores.argmax(1) == unseen["attention"].argmax(1)).float().mean()
        assert right > 0.9 if finds else right < 0.5


def test_a_guide_tells_an_image_from_the_next() -> None:
    """The same tokens at the same places of two grids."""
    torch.manual_seed(0)
    coords = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 1], [1, 1, 0]])[None]
    with torch.no_grad():
        scores = PREDICTORS["guided"](32)(torch.ones(1, 4, 32), coords, torch.ones(1, 1, 32), torch.ones(1, 1).bool())
    assert len(set(scores.flatten().tolist())) == 4


def fitted(kind: str, count: int, piece: Callable[[int], Watched], epochs: int) -> Any:
    predictor = PREDICTORS[kind](32)
    fit_predictor(predictor, 0, count, piece, epochs, seed=0)
    return predictor


def test_activations_beyond_half_precision_are_kept_as_its_ends(make_pair: Any) -> None:
    site = Site(1, (KEEP, Expert("predicted", 0.25)))
    _, model = make_pair(sites=(site,), static_route=(1,))
    with torch.no_grad():
        model.text_model.layers[0].mlp.down_proj.weight *= 1e9
    piece = watch_attention(model, examples(), [2], pad=3)
    assert all(piece[name].isfinite().all() for name in ("2.tokens", "2.text", "attention"))
    assert piece["2.tokens"].abs().max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize("kind", PREDICTORS)
def test_a_predictor_that_cannot_learn_stays_as_it_was(kind: str) -> None:
    tokens = torch.full((2, 4, 32), torch.nan)
    piece = {"0.tokens": tokens, "0.text": tokens, "0.is_text": torch.ones(2, 4).bool(), "attention": torch.ones(2, 4)}
    predictor = PREDICTORS[kind](32)
    before = deepcopy(predictor.state_dict())
    fit_predictor(predictor, 0, 2, lambda i: piece | {"coords": torch.zeros(2, 4, 3)}, epochs=1, seed=0)
    assert all(torch.equal(values, before[name]) for name, values in predictor.state_dict().items())


@pytest.mark.parametrize("hidden_size", [48, 1024])
def test_shapes_are_those_that_the_config_foretells(hidden_size: int) -> None:
    pyramid = PyramidConfig(sites=(Site(-1, (KEEP, *map(Expert.parse, FORESEEN))),))
    found = {
        f"predictors.{name}": tuple(parameter.shape)
        for name, parameter in new_predictors(hidden_size, pyramid).named_parameters()
    }
    assert found == {name: size for name, size in pyramid.dpe_tensors(hidden_size).items() if "predictors" in name}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_pictures(tmp_path_factory.mktemp("pictures"), 26)


@pytest.fixture(scope="module")
def calibrated(tiny_llava: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = convert(str(tiny_llava), load_recipe("demo", PREDICTED), tmp_path_factory.mktemp("out") / "dpn").output
    calibrate(folder, DataOptions(str(data)), calibration_recipe(folder, (), dict(RECIPE)))
    return folder


def logits(folder: Path, route: str | None = None) -> torch.Tensor:
    model = load_model(folder, dtype=torch.float32)
    if route:
        model.set_route(route)
    with torch.no_grad():
        return model(**prompt(1, 3, 5, seed=0)).logits


def test_calibration_stores_them_and_every_export_has_them(calibrated: Path, tmp_path: Path) -> None:
    export(calibrated, tmp_path / "routed")
    for name, route in enumerate(FORESEEN):
        before = logits(calibrated, route)
        assert torch.equal(logits(tmp_path / "routed", route), before)
        export(calibrated, tmp_path / str(name), ExportOptions(static=route))
        assert torch.equal(logits(tmp_path / str(name)), before)
    export(calibrated, tmp_path / "fastv", ExportOptions(static="fastv:K=2,R=0.5"))
    assert not any("predictors" in name for name in open_converted(tmp_path / "fastv")[0].tensors)


def test_a_route_on_a_predictor_that_is_not_fitted_is_refused(
    tiny_llava: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = convert(str(tiny_llava), load_recipe("demo", PREDICTED), tmp_path / "dpn").output
    with pytest.raises(UsageError, match=r"not calibrated, so predicted:0\.25 would keep random tokens"):
        export(folder, tmp_path / "export", ExportOptions(static="predicted:0.25"))
    for command in (["run", "--image", str(picture), "What?"], ["eval", "--data", "demo", "--samples", "2"]):
        assert main([*command, "--model", str(folder), "--route", "predicted:0.25"]) == 2
        assert "not calibrated, so predicted:0.25 would keep random tokens" in capsys.readouterr().err
    export(folder, tmp_path / "full", ExportOptions(static="keep"))
    export(folder, tmp_path / "anyway", ExportOptions(static="predicted:0.25", uncalibrated=True))
    export(tmp_path / "anyway", tmp_path / "again")


def test_an_export_answers_the_same_without_dpn(calibrated: Path, tmp_path: Path) -> None:
    """In a process that cannot import this package."""
    export(calibrated, tmp_path / "export", ExportOptions(static="guided:0.25"))
    torch.save((prompt(1, 3, 5, seed=0), logits(calibrated, "guided:0.25")), tmp_path / "expected.pt")
    code = (
        "import torch\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        f"inputs, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'export')!r}, trust_remote_code=True, dtype=torch.float32)\n"
        "with torch.no_grad(): found = model.eval()(**inputs).logits\n"
        "assert torch.equal(found, expected)\n"
    )
    run_elsewhere(code, cwd=tmp_path)


def test_samples_of_its_own_take_no_part_in_fitting_the_routers(
    tiny_llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = convert(str(tiny_llava), load_recipe("demo", PREDICTED), tmp_path / "dpn").output
    totals: dict[str, int] = {}

    def progress(title: str, total: int) -> Any:
        totals[title] = totals.get(title, 0) + total
        return Reporter().progress(title, total)

    recipe = calibration_recipe(folder, (), {**RECIPE, "predictors": {"samples": 26}})
    calibrate(folder, DataOptions(str(data)), recipe, Reporter(progress=progress))
    assert totals["watching attention"] == 22, "ten further ones, and those 12 of the 16 that are not held out"
    assert totals["measuring routes"] == 16
    assert totals["reading the data"] == 16 and totals["reading more data"] == 26


def test_what_was_observed_is_not_observed_again(
    tiny_llava: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = convert(str(tiny_llava), load_recipe("demo", PREDICTED), tmp_path / "dpn").output
    recipe = calibration_recipe(folder, (), dict(RECIPE))
    monkeypatch.setattr(stage, "TOKENS", 100)
    monkeypatch.setattr(stage, "fit_predictor", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(folder, DataOptions(str(data)), recipe)
    kept = sorted((folder / "calibration" / "state").glob("attention-*"))
    assert len(kept) == 2 and load_file(kept[0])["attention"].shape == (8, stage.TOKENS)
    copy = shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.undo()
    monkeypatch.setattr("dpn_cli.calibration.predictors.watch_attention", lambda *args: 1 / 0)
    calibrate(copy, DataOptions(str(data)), recipe)
    assert not (copy / "calibration" / "state").exists()


def test_budgets_alone_are_solved_on_as_many_samples_as_are_asked_for(
    calibrated: Path, data: Path, tmp_path: Path
) -> None:
    """No predictor learns then, so that none needs samples of its own."""
    folder = shutil.copytree(calibrated, tmp_path / "dpn")
    report = calibrate(folder, DataOptions(str(data)), budgets_recipe(folder, (), {"samples": 5}), only="budgets")
    assert report is not None and report.summary()["held_out"] == 5
