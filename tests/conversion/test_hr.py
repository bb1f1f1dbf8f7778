"""LLaVA-HR in its original layout converts to a LLaVA that answers alike, and goes through everything a LLaVA does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import dpn_cli
from dpn_cli.calibration.calibrate import calibrate
from dpn_cli.checkpoint.headers import Checkpoint, read_json
from dpn_cli.checkpoint.inspection import inspect_checkpoint
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.cli import main
from dpn_cli.conversion.convert import convert
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import CheckpointError
from dpn_cli.exporting.export import export
from dpn_cli.families.tensors import llava_tensors
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.pyramid.config import DPE_PARTS
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.conversion.test_dpn_authors import NEW_ROUTER, OLD_ROUTER, make_dpn, prompts
from tests.conversion.test_tokenizer import reference_pixels
from tests.converted import pretend_calibration
from tests.exporting.test_export import answer, in_fresh_process
from tests.hr import SIZE, SLOW, TOWER, Hr, Tensors, write_full_size
from tests.originals import Original
from tests.pyramids import collate, scramble_routers
from tests.runs import FEW

VISUAL = 64  # tokens of an image
ROWS = 340  # of the original's embedding


def prompt(seed: int, before: int = 5, after: int = 7, images: int = 1) -> list[int]:
    """Return ids in which -1 stands for an image."""
    words = torch.randint(3, ROWS, (before + after,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [1, *words[:before], *[-1] * images, *words[before:]]


def inputs(ids: list[int], pixels: torch.Tensor, visual: int = VISUAL) -> dict[str, torch.Tensor]:
    """Return what the converted model takes."""
    expanded = [each for i in ids for each in ([ROWS] * visual if i == -1 else [i])]
    return {"input_ids": torch.tensor([expanded]), "pixel_values": pixels}


def pictures(seed: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [{}, {"files": "safetensors", "scale": "gamma"}, {"frozen": True, "text": "mistral"}],
    ids=str,
)
@torch.inference_mode()
def test_an_import_gives_the_logits_of_the_description(
    make_hr: Callable[..., Hr], tmp_path: Path, options: dict[str, Any]
) -> None:
    hr = make_hr(**options)
    model = dpn_cli.load(convert(str(hr.original.folder), output=tmp_path / "out").output)
    for seed in range(2):
        batch = inputs(prompt(seed), pictures(seed))
        found = model(**batch).logits[0, :, :ROWS]
        torch.testing.assert_close(found, hr.logits(prompt(seed), pictures(seed)), rtol=1e-4, atol=1e-4)
        with model.teacher():
            assert torch.equal(model(**batch).logits[0, :, :ROWS], found)  # lossless
    features = torch.cat(model.model.get_image_features(pictures(0)).pooler_output)
    torch.testing.assert_close(features, hr.embed(pictures(0))[0], rtol=1e-5, atol=1e-5)


def test_nothing_but_the_classifier_is_lost(make_hr: Callable[..., Hr], tmp_path: Path) -> None:
    hr = make_hr(dtype=torch.float16)
    done = convert(str(hr.original.folder), output=tmp_path / "out")
    checkpoint, dropped = Checkpoint.open(done.output), f"{SLOW}head.norm.bias"
    assert done.notes == (f"Tensors that nothing uses are left out: 2, such as {dropped}.",)
    found = {name: t.shape for name, t in checkpoint.tensors.items() if not any(part in name for part in DPE_PARTS)}
    assert found == llava_tensors(checkpoint.config)
    tower = [name for name in hr.tensors if name.startswith(TOWER) and not name.startswith(f"{SLOW}head.")]
    assert len(tower) == sum(name.startswith("vision_tower.") for name in found)
    assert {t.dtype for name, t in checkpoint.tensors.items() if name in found} == {"F16"}
    assert checkpoint.config["image_seq_length"] == VISUAL
    model = dpn_cli.load(tmp_path / "out")
    stored = model.model.vision_tower.slow[1].layers[1].gamma
    assert torch.equal(stored, hr.tensors[f"{SLOW}stages.1.blocks.1.weight"])
    assert inspect_checkpoint(tmp_path / "out").grids == ((8, 8),)


@pytest.mark.parametrize("size", [(90, 40), (300, 411)])
def test_pixels_and_prompts_are_those_of_the_original_code(
    make_hr: Callable[..., Hr], tmp_path: Path, size: tuple[int, int]
) -> None:
    folder = convert(str(make_hr().original.folder), output=tmp_path / "out").output
    processor = AutoProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}
    text = processor.apply_chat_template([question], add_generation_prompt=True)
    found = processor(text=text, images=Image.fromarray(pixels), return_tensors="np")
    assert np.array_equal(found["pixel_values"][0], reference_pixels(Image.fromarray(pixels), SIZE))
    assert (found["input_ids"] == ROWS).sum() == VISUAL
    assert text.startswith("A chat between a curious user") and text.endswith("ASSISTANT:")


def test_it_is_measured_beside_its_original(
    make_hr: Callable[..., Hr], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = convert(str(make_hr().original.folder), output=tmp_path / "out").output
    line = ["bench", "--model", str(folder), "--route", "0,0,1,0,0", "--rounds", "1", "--new-tokens", "2", "--json"]
    assert main(line) == 0
    fixed = json.loads(capsys.readouterr().out)["runs"][0]["measurements"][1]
    *_, route = inspect_checkpoint(folder, asked=["0,0,1,0,0"]).routes
    assert fixed["fraction"] == pytest.approx(route.fraction, abs=0.02)  # of the same 64 words and 64 patches


@torch.inference_mode()
def test_it_is_saved_and_loaded_by_transformers(make_hr: Callable[..., Hr], tmp_path: Path) -> None:
    folder = convert(str(make_hr(dtype=torch.bfloat16).original.folder), output=tmp_path / "out").output
    model, batch = dpn_cli.load(folder), inputs(prompt(0), pictures(0))
    model.save_pretrained(tmp_path / "saved")
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_a_batch_gives_what_its_samples_give(make_hr: Callable[..., Hr], tmp_path: Path, side: str) -> None:
    folder = convert(str(make_hr().original.folder), load_recipe("demo"), tmp_path / "out").output
    pretend_calibration(folder)
    model = dpn_cli.load(folder)
    scramble_routers(model, seed=1)  # they disagree
    model.set_budget(0.6)
    counts = [(5, 7, 1), (2, 3, 1), (9, 1, 2), (3, 11, 1), (1, 30, 1)]
    samples = [inputs(prompt(seed, *count), pictures(seed, count[2])) for seed, count in enumerate(counts)]
    samples.append({"input_ids": torch.tensor([[1, 7, 8, 9]])})
    alone, routes = [], []
    for sample in samples:
        alone.append(model(**sample).logits[0, -1])
        routes += model.last_routes
    batch = collate(samples, side)
    together = model(**batch).logits
    assert model.last_routes == routes and len(set(routes)) > 2
    last = batch["attention_mask"].shape[1] - 1 - batch["attention_mask"].flip(1).argmax(1)
    torch.testing.assert_close(together[range(len(samples)), last], torch.stack(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_is_calibrated_and_exported_to_where_dpn_is_not_installed(
    make_hr: Callable[..., Hr], picture: Path, tmp_path: Path
) -> None:
    folder = convert(str(make_hr().original.folder), output=tmp_path / "out").output
    (tmp_path / "data").mkdir()
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i:02}.png")
    recipe = CalibrationRecipe.model_validate({**FEW, "budget": 0.75})
    calibrate(folder, DataOptions(str(tmp_path / "data")), recipe)
    expected, routes = answer(dpn_cli.load(folder), folder, picture)
    assert any(routes[0])
    export(folder, tmp_path / "export")
    assert answer(dpn_cli.load(tmp_path / "export"), tmp_path / "export", picture) == (expected, routes)
    found = in_fresh_process(tmp_path / "export", picture, tmp_path)
    assert found["keys"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert found["bare_missing"] == [] and "dpn_cli" not in found["module"]
    assert (found["text"], found["routes"], found["piped"].strip()) == (expected, routes, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"prepooling": True, "router_version": "v2", "use_special_token": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_checkpoint_of_the_dpn_authors_gives_the_outputs_of_their_evaluation(
    make_hr: Callable[..., Hr], tmp_path: Path, options: dict[str, Any]
) -> None:
    made: list[Hr] = []

    def make(**each: Any) -> Original:
        made.append(make_hr(**each))
        return made[0].original

    original, reference = make_dpn(make, **options)
    original.edit(is_multipath_encoder=True, input_image_size=SIZE)
    reference.visual = lambda pixels: pooled(made[0], pixels, 2 if options else 1)  # type: ignore[method-assign]
    model = dpn_cli.load(convert(str(original.folder), output=tmp_path / "out").output)
    special, routes = reference.pooling["use_special_token"], set()
    for seed, ids in enumerate(prompts(special)):
        reference.keys, reference.values, reference.route = [], [], []
        expected = reference.prefill(ids, pictures(seed))
        moved = [NEW_ROUTER if special and i == OLD_ROUTER else i for i in ids]
        found = model(**inputs(moved, pictures(seed), 16 if options else VISUAL)).logits[0, -1]
        torch.testing.assert_close(found[:ROWS], expected[:ROWS], rtol=1e-4, atol=1e-4)
        routes.add(model.last_routes[0])
    assert any(map(any, routes))


def pooled(hr: Hr, pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Return projected tokens [V, D], averaged in squares before the projector."""
    from torch.nn import functional as F

    from tests.hr import features, linear

    grid = features(hr.tensors, pixels).transpose(1, 2).unflatten(2, (8, 8))
    tokens = F.avg_pool2d(grid, side).flatten(2).transpose(1, 2)
    return linear(hr.tensors, "model.mm_projector.2", F.gelu(linear(hr.tensors, "model.mm_projector.0", tokens)))[0]


def test_a_converted_one_is_not_converted_again(make_hr: Callable[..., Hr], tmp_path: Path) -> None:
    folder = convert(str(make_hr().original.folder), output=tmp_path / "out").output
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"model_type": "llava"})
    with pytest.raises(CheckpointError, match="start from its original"):
        convert(str(folder), output=tmp_path / "again")


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({"input_image_size": None}, "None as input_image_size"),
    "size in words": ({"input_image_size": "1024"}, "'1024' as input_image_size"),
    "size of no whole grid": ({"input_image_size": 250}, "250 as input_image_size, expected 32 times a number"),
    "size of an odd grid": ({"input_image_size": 96}, "at least 4 or divides it"),
    "frozen": ({"freeze_vision": True}, r"vision_tower\.adapters\.0\."),
    "another fast tower": ({"mm_vision_tower": "google/siglip-so400m-patch14-384"}, "siglip-so400m"),
    "tiles": ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_llava_hr_is_refused(make_hr: Callable[..., Hr], tmp_path: Path, fault: str) -> None:
    changes, message = FAULTS[fault]
    hr = make_hr()
    hr.original.edit(**changes)
    refused(hr, tmp_path, message)


def edited(change: Callable[[Tensors], None]) -> Callable[[Hr], None]:
    """Return what changes the tensors of a folder of safetensors."""

    def edit(hr: Hr) -> None:
        from safetensors.torch import load_file, save_file

        path = hr.original.folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no adapters": (lambda t: [t.pop(name) for name in list(t) if "latent" in name], r"adapters\.0\."),
    "a block without scale": (lambda t: t.pop(f"{SLOW}stages.1.blocks.0.weight"), r"slow\.1\.layers\.0\.gamma"),
    "no CLIP": (lambda t: [t.pop(n) for n in list(t) if "fast_vision" in n], "fast_vision.* is missing: expected both"),
    "no ConvNeXt": (lambda t: [t.pop(n) for n in list(t) if "slow_vision" in n], "slow_vision.* is missing"),
    "seven layers": (lambda t: [t.pop(n) for n in list(t) if "encoder.layers.7." in n], "CLIP has 7 layers"),
    "another head": (lambda t: t.update({f"{TOWER}pooler.weight": torch.ones(2)}), "pooler.weight', which neither"),
    "another width": (lambda t: t.update({f"{TOWER}align_stages.0.slow_proj.weight": torch.ones(64, 9)}), r"\[64, 9\]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_nothing_is_written(make_hr: Callable[..., Hr], tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    hr = make_hr(files="safetensors")
    edited(change)(hr)
    refused(hr, tmp_path, message)


def refused(hr: Hr, tmp_path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(str(hr.original.folder), output=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_clip_sizes_can_come_from_another_model(make_hr: Callable[..., Hr], tmp_path: Path) -> None:
    hr = make_hr()
    hr.original.edit(mm_vision_tower="someone/fine-tuned")
    refused(hr, tmp_path, "from 'someone/fine-tuned', expected one of OpenAI's: pass as --vision-tower")
    hr.original.edit(input_image_size=384)
    with pytest.raises(CheckpointError, match="do not belong together"):  # the fixture's CLIP is another one
        convert(str(hr.original.folder), output=tmp_path / "out", vision_tower=str(hr.original.clip))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "full_bytes"), [("llava-hr-7b", 14.56e9), ("llava-hr-x-13b", 28.49e9)])
def test_the_full_shapes_convert_in_little_memory(
    tokenizer_model: Path, tmp_path: Path, model: str, full_bytes: float
) -> None:
    write_full_size(tmp_path / model, tokenizer_model, model, num_layers=4)
    code = (
        "import sys; from pathlib import Path; from dpn_cli.conversion.convert import convert;"
        "convert(sys.argv[1], output=Path(sys.argv[2]));"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"  # not ru_maxrss: exec keeps that
    )
    line = [sys.executable, "-c", code, str(tmp_path / model), str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < full_bytes / 10
    assert inspect_checkpoint(tmp_path / "out").grids == ((32, 32),)
