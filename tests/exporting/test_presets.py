"""Methods of the literature as exports: static pyramids that need nothing but transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpn_cli.checkpoint.headers import Checkpoint, read_json
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.cli import main
from dpn_cli.errors import UsageError
from dpn_cli.evaluation.baselines.static import StaticPyramid
from dpn_cli.exporting.export import export
from dpn_cli.exporting.options import ExportOptions
from dpn_cli.inference.loading import load_model
from dpn_cli.pyramid.presets import PRESETS, parse_preset, preset_of
from tests.exporting.test_export import in_fresh_process
from tests.exports import stored
from tests.pyramids import collate, ragged_batch

BASELINES = {
    "pyramiddrop:0.5": StaticPyramid("pyramiddrop", 0.5),
    "fastv:K=3,R=0.6": StaticPyramid("fastv", 0.4, first_layers=3),
    "divprune:0.25": StaticPyramid("divprune", 0.25),
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
FRESH = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForImageTextToText
folder, file, _ = sys.argv[1:]
samples, batch, greedy = torch.load(file)
found = {}
for path in sorted(Path(folder).iterdir()):
    model, info = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    model.double()
    with torch.no_grad():
        logits = model(**batch).logits[:, -1].tolist()
    found[path.name] = {
        "keys": [sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")],
        "module": type(model).__module__, "logits": logits,
        "together": model.generate(**batch, **greedy)[:, -6:].tolist(),
        "alone": [model.generate(**sample, **greedy)[0, -6:].tolist() for sample in samples],
    }
print(json.dumps(found))
"""


def test_exports_are_the_baselines_where_dpn_is_not_installed(
    make_converted: Callable[..., Path], tmp_path: Path
) -> None:
    folder, samples = make_converted(), ragged_batch()
    batch = collate(samples)
    torch.save((samples, batch, GREEDY), tmp_path / "batch.pt")
    for i, text in enumerate(BASELINES):
        done = export(folder, tmp_path / "exports" / str(i), ExportOptions(static=text))
        assert not any("routers" in name for name in Checkpoint.open(done.output).tensors)
    found = in_fresh_process(tmp_path / "exports", tmp_path / "batch.pt", tmp_path, FRESH)
    model = load_model(folder).double()
    for each, (text, baseline) in zip(found.values(), BASELINES.items(), strict=True):
        assert each["keys"] == [[], [], []] and "dpn_cli" not in each["module"]
        assert each["together"] == each["alone"], text
        pyramid = parse_preset(text, 8)
        assert pyramid is not None
        for way in (model.as_pyramid(pyramid), baseline.applied(model)):
            with torch.no_grad(), way:
                logits = model(**batch).logits[:, -1]
            assert (logits - torch.tensor(each["logits"], dtype=torch.double)).abs().max() < 1e-8


@pytest.mark.parametrize("text", BASELINES)
def test_the_card_names_the_method_and_its_source(
    make_converted: Callable[..., Path], tmp_path: Path, text: str
) -> None:
    done = export(make_converted(), tmp_path / "out", ExportOptions(static=text))
    card = (tmp_path / "out" / "README.md").read_text()
    preset = PRESETS[text.partition(":")[0]]
    assert f"`{text}`" in card and preset.about in card and preset.source in card
    assert preset_of(load_model(tmp_path / "out").pyramid) == preset_of(done.pyramid) == (text, preset)
    assert "Calibration" not in card and "small routers" not in card


def test_a_preset_needs_no_calibration(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    done = export(make_converted(calibrated=False), tmp_path / "out", ExportOptions(static="random:0.25"))
    config = read_json(tmp_path / "out" / "config.json")["pyramid"]
    assert config["static_route"] == [1] and config["calibration"] == {"preset": "random:0.25"}
    assert done.pyramid.answer_cue and done.pyramid.budgets == ()


def test_a_preset_of_a_healed_checkpoint_has_the_weights_of_the_original(
    make_converted: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_converted()
    export(folder, tmp_path / "plain", ExportOptions(static="stride:0.5"))
    adapter, module = folder / "calibration" / "adapter", "base_model.model.model.language_model.layers.2.mlp.up_proj"
    adapter.mkdir()
    matrices = {"A": torch.ones(4, 64), "B": torch.ones(128, 4)}
    save_file({f"{module}.lora_{k}.weight": v for k, v in matrices.items()}, adapter / "adapter_model.safetensors")
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": 8, "r": 4})
    config = read_json(folder / "config.json")
    config["pyramid"]["calibration"] |= {"adapter": "calibration/adapter", "training": {"steps": 1}}
    write_json(folder / "config.json", config)
    export(folder, tmp_path / "preset", ExportOptions(static="stride:0.5"))
    export(folder, tmp_path / "route", ExportOptions(static="keep,1x2,keep,keep,keep"))
    assert stored(tmp_path / "preset") == stored(tmp_path / "plain") != stored(tmp_path / "route")


def test_the_command_names_what_it_wrote(
    make_converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    make_converted()
    monkeypatch.chdir(tmp_path)
    line = ["export", "--model", "tiny-dpn", "--static", "fastv: K=3, R=0.6"]
    assert main([*line, "-o", "out"]) == 0
    assert "fixed, fastv:K=3,R=0.6" in capsys.readouterr().out
    assert main([*line, "-o", "out2", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["preset"], done["static_route"]) == ("fastv:K=3,R=0.6", [1])
    assert main(["inspect", "out"]) == 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("divprune", "expected divprune:0.5 (keeps half)"),
        ("divprune:1.5", "expected divprune:0.5 (keeps half)"),
        ("divprune:K=3,R=0.5", "expected divprune:0.5 (keeps half)"),
        (
            "fastv:K=8,R=0.5",
            "expected fastv:K=3,R=0.5 (drops half after the first 3 of 8 layers) or fastv:0.5 (keeps half)",
        ),
        ("fastv:K=3,R=0.0", "expected fastv:K=3,R=0.5"),
        ("divprune:0.00001", "expected divprune:0.5 (keeps half)"),
        ("pyramiddrop:0.01", "attended:0.01 would keep all of 1 tokens at site 1"),
        ("fastw:0.5", "'fastw:0.5' is neither a method (random, stride, fastv,"),
        ("fastw:K=3,R=0.5", "Did you mean 'fastv'?"),
        ("PyramidDrp:0.5", "Did you mean 'pyramiddrop'?"),
        ("CDPruner:0.25", "Did you mean 'cdpruner'?"),
        ("divprune 0.5", "Did you mean 'divprune'?"),
        ("exti", "an expert for each of its 5 sites). Did you mean 'exit'?"),
        ("attended:0.5", "expected 5 experts, one for each site"),
        ("kep,1x2,keep,keep,exti", "'kep' is not an expert of site 0: expected one of keep, "),
        ("keep,1x2,keep,keep,exti", "Did you mean 'exit'?"),
    ],
)
def test_what_is_no_preset_is_refused(
    make_converted: Callable[..., Path], tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(UsageError) as error:
        export(make_converted(), tmp_path / "out", ExportOptions(static=text))
    assert complaint in str(error.value)
    assert not (tmp_path / "out").exists()
