"""An export is the converted model, in one folder that needs nothing but transformers."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open

from dpn_cli.checkpoint.headers import Checkpoint, read_json
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import CheckpointError, DpnError, UsageError
from dpn_cli.exporting.content import write_weights
from dpn_cli.exporting.export import export
from dpn_cli.exporting.model_card import TRANSFORMERS
from dpn_cli.exporting.options import ExportOptions
from dpn_cli.exporting.plan import parse_size
from dpn_cli.families.family import FAMILIES
from dpn_cli.families.tensors import memory_name
from tests.converted import pretend_calibration
from tests.elsewhere import run_elsewhere
from tests.exports import QUESTION, answer, stored
from tests.heard import Heard
from tests.tiled import collate_tiled, tiled_prompt

# Run where dpn is not installed; print what they found as JSON.
FRESH = """
import json, sys
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
folder, image, question = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(
    folder, dtype="auto", trust_remote_code=True, output_loading_info=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=[Image.open(image)], return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1]:]
messages[0]["content"][0]["url"] = image
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
piped = pipe(text=messages, max_new_tokens=8, generate_kwargs={"do_sample": False}, return_full_text=False)
bare, bare_info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
print(json.dumps({
    "keys": {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")},
    "bare_missing": sorted(bare_info["missing_keys"]), "bare": type(bare).__name__,
    "module": type(model).__module__, "text": processor.decode(tokens[0]), "routes": model.last_routes,
    "piped": piped[0]["generated_text"], "dtype": str(model.dtype),
}))
"""

# The same without a processor, which for LLaVA-OneVision needs torchvision: on inputs that were saved.
FRESH_ON_INPUTS = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText
folder, file, _ = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
tokens = model.generate(**torch.load(file), max_new_tokens=8, do_sample=False)
print(json.dumps({
    "keys": [sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")],
    "type": type(model).__name__, "module": type(model).__module__, "tokens": tokens.tolist(),
    "routes": model.last_routes,
}))
"""


def in_fresh_process(folder: Path, file: Path, tmp_path: Path, code: str = FRESH) -> dict[str, Any]:
    output = run_elsewhere(code, folder, file, QUESTION, cwd=tmp_path)
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("family", "text", "layout"),
    [
        ("llava", "llama", "hub"),
        ("llava", "qwen3", "new"),
        pytest.param("llava_next", "mistral", "hub", marks=pytest.mark.slow),
    ],
)
def test_an_export_answers_alike_where_dpn_is_not_installed(
    make_converted: Callable[..., Path], picture: Path, tmp_path: Path, family: str, text: str, layout: str
) -> None:
    from dpn_cli.inference.loading import load_model

    folder = make_converted(text, layout, family=family)
    expected, routes = answer(load_model(folder), folder, picture)
    assert any(routes[0]), "the routers must pool for this test to mean something"
    export(folder, tmp_path / "out", ExportOptions(max_shard_size="500KB"))
    found = in_fresh_process(tmp_path / "out", picture, tmp_path)
    assert found["keys"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert found["bare_missing"] == [] and found["bare"] == f"{FAMILIES[family].stem}Model"
    assert found["module"].endswith("modeling_dpn_llava") and "dpn_cli" not in found["module"]
    assert (found["text"], found["routes"]) == (expected, routes)
    assert found["piped"].strip() == expected


@pytest.mark.slow
def test_onevision_answers_alike_where_dpn_is_not_installed(
    make_converted: Callable[..., Path], tmp_path: Path
) -> None:
    """Two tile layouts and two images at once, in one batch."""
    import torch

    from dpn_cli.inference.loading import load_model

    model = load_model(make_converted("qwen2", family="llava_onevision"))
    sizes = [[(30, 70)], [(90, 31)], [(40, 40), (20, 33)]]
    batch = collate_tiled([tiled_prompt(model, each, 3, 5, seed) for seed, each in enumerate(sizes)])
    torch.save(batch, tmp_path / "batch.pt")
    expected = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert any(map(any, model.last_routes)), "the routers must pool for this test to mean something"
    export(tmp_path / "tiny-dpn", tmp_path / "out")
    found = in_fresh_process(tmp_path / "out", tmp_path / "batch.pt", tmp_path, FRESH_ON_INPUTS)
    assert found["keys"] == [[], [], []] and found["type"] == "DpnLlavaOnevisionForConditionalGeneration"
    assert "dpn_cli" not in found["module"]
    assert found["tokens"] == expected.tolist()
    assert found["routes"] == [list(route) for route in model.last_routes]


@pytest.mark.parametrize("layout", ["hub", "new"])
def test_an_export_loads_whole_with_the_registered_classes(
    make_converted: Callable[..., Path], picture: Path, tmp_path: Path, layout: str
) -> None:
    from transformers import AutoModelForImageTextToText

    from dpn_cli.inference.loading import load_model
    from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration

    folder = make_converted(layout=layout)
    export(folder, tmp_path / "out")
    for trust in (None, True):  # what is registered wins over what comes along
        model, info = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "out", trust_remote_code=trust, output_loading_info=True
        )
        assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(model) is DpnLlavaForConditionalGeneration
        assert answer(model, tmp_path / "out", picture) == answer(load_model(folder), folder, picture)


def test_tensors_stay_byte_for_byte_under_their_new_names(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    before = stored(make_converted("mistral", "hub", shards=2))
    export(tmp_path / "tiny-dpn", tmp_path / "out", ExportOptions(max_shard_size="300000"))
    after = stored(tmp_path / "out")
    assert {memory_name(name): content for name, content in before.items()} == after
    assert sum(".routers." in name for name in after) == 30


def test_both_layouts_give_the_same_files(tiny_llava_factory: Callable[..., Path], tmp_path: Path) -> None:
    shards = {}
    for layout, count in (("hub", 1), ("new", 2)):
        folder = tmp_path / f"{layout}-dpn"
        convert(str(tiny_llava_factory(layout=layout, shards=count)), output=folder)
        done = export(folder, tmp_path / layout, ExportOptions(max_shard_size="400KB", uncalibrated=True))
        shards[layout] = {file: (tmp_path / layout / file).read_bytes() for file in done.files}
    assert len(shards["hub"]) > 1
    assert shards["hub"] == shards["new"]


def test_shards_are_small_and_indexed(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    done = export(make_converted(), tmp_path / "out", ExportOptions(max_shard_size="400KB"))
    assert len(done.files) > 1 and not (tmp_path / "out" / "model.safetensors").exists()
    tensors = Checkpoint.open(tmp_path / "out").tensors
    assert (len(tensors), sum(t.nbytes for t in tensors.values())) == (done.num_tensors, done.nbytes)
    for file in done.files:
        inside = [tensor.nbytes for tensor in tensors.values() if tensor.file == file]
        assert sum(inside) <= 400_000 or len(inside) == 1
        with safe_open(tmp_path / "out" / file, framework="np") as opened:
            assert opened.metadata()["format"] == "pt"
            assert "sites" in json.loads(opened.metadata()["pyramid"])
    single = export(tmp_path / "tiny-dpn", tmp_path / "single")
    assert single.files == ("model.safetensors",)
    assert not (tmp_path / "single" / "model.safetensors.index.json").exists()


def test_the_folder_is_complete_and_compact(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoProcessor

    folder = make_converted()
    (folder / "leftover.py").write_text("raise SystemExit")
    export(folder, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "modeling_dpn_llava.py", "README.md", "model.safetensors", "generation_config.json"} <= found
    assert not {"dpe.safetensors", "calibration", "dpn_recipe.json", "leftover.py"} & found
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template
    config = read_json(tmp_path / "out" / "config.json")
    assert config["model_type"] == "dpn_llava" and config["base_model"]
    assert config["auto_map"]["AutoConfig"] == "modeling_dpn_llava.DpnLlavaConfig"
    assert config["dtype"] == "float32"


def test_the_card_says_what_it_is(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    export(make_converted(calibrated=False), tmp_path / "plain", ExportOptions(uncalibrated=True))
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "torchvision" not in card
    assert "Not calibrated" in card and "12×12 = 144 visual tokens" in card
    assert "| before the first layer | keep, pool:1x2, pool:2x2, diverse:0.5+8x8," in card
    assert "| after layer 5 |" in card
    pretend_calibration(tmp_path / "tiny-dpn")
    export(tmp_path / "tiny-dpn", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 0.600 | 3 | 0.0500 |" in card
    assert r"| data | mydata\|2.json |" in card and "| agreement interval | 0.9, 1 |" in card
    assert card.count("trust_remote_code=True") == 2 and "dpn_cli.load" in card and "set_budget" in card


def test_the_card_of_onevision_names_what_its_processor_needs(
    make_converted: Callable[..., Path], tmp_path: Path
) -> None:
    export(make_converted(family="llava_onevision"), tmp_path / "out")
    assert "pip install torchvision" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_names_the_releases_that_the_package_takes_and_is_tested_with() -> None:
    root = Path(__file__).parents[2]
    oldest, newest = TRANSFORMERS.split(" to ")
    assert f'"transformers>={oldest},<6"' in (root / "pyproject.toml").read_text()
    assert f"transformers=={newest}\n" in (root / "constraints.txt").read_text()


def test_a_budget_becomes_the_trade_off(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_converted()
    assert export(folder, tmp_path / "kept").pyramid.trade_off == 2.0
    export(folder, tmp_path / "out", ExportOptions(budget=0.7))
    assert read_json(tmp_path / "out" / "config.json")["pyramid"]["lambda"] == pytest.approx(2.0)
    export(folder, tmp_path / "out", ExportOptions(budget=0.69), force=True)
    assert read_json(tmp_path / "out" / "config.json")["pyramid"]["lambda"] == pytest.approx(2.5)
    assert read_json(folder / "config.json")["pyramid"]["lambda"] == 2.0
    kept, changed = ((tmp_path / name / "README.md").read_text() for name in ("kept", "out"))
    assert "λ = 2, which is a budget of 0.7" in kept and "0.9877" in kept
    assert "λ = 2.5, which is a budget of 0.69" in changed and "0.9877" not in changed, "that was of another budget"
    with pytest.raises(UsageError, match="out of reach"):
        export(folder, tmp_path / "cheap", ExportOptions(budget=0.3))
    assert not (tmp_path / "cheap").exists()


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_a_dtype_converts_all_but_the_routers(
    make_converted: Callable[..., Path], tmp_path: Path, dtype: str, name: str
) -> None:
    import torch

    from dpn_cli.inference.loading import load_model

    folder = make_converted()
    export(folder, tmp_path / "out", ExportOptions(dtype=dtype))
    original = load_model(folder).state_dict()
    model = load_model(tmp_path / "out")
    assert str(model.text_model.embed_tokens.weight.dtype) == f"torch.{name}"
    for key, tensor in model.state_dict().items():
        wanted = torch.float32 if ".routers." in key else getattr(torch, name)
        assert tensor.dtype == wanted
        assert torch.equal(tensor, original[key].to(wanted))


def test_a_value_that_fp16_cannot_hold_is_refused(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = make_converted()
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.norm.weight"][3] = 70_000
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values above 65504"):
        export(folder, tmp_path / "out", ExportOptions(dtype="fp16"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_refused(
    make_converted: Callable[..., Path], tiny_llava: Path, tmp_path: Path
) -> None:
    folder = make_converted()
    with pytest.raises(CheckpointError, match="run `dpn convert"):
        export(tiny_llava, tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not exist"):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        export(folder, tmp_path / "out", ExportOptions(dtype="int8"))
    with pytest.raises(UsageError, match="overlaps"):
        export(folder, folder / "inside")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError):
            export(folder, tmp_path / "mine", force=force)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_the_model_has_not_is_refused(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = make_converted()
    tensors = load_file(folder / "dpe.safetensors") | {"adapter.weight": np.zeros(3, np.float32)}
    save_file(tensors, folder / "dpe.safetensors")
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["adapter.weight"] = "dpe.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=r"adapter\.weight"):
        export(folder, tmp_path / "out")


def test_buffers_of_old_versions_are_left_out(tiny_llava: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    old = Path(shutil.copytree(tiny_llava, tmp_path / "old"))
    tensors = load_file(old / "model.safetensors")
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(145)[None]
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    convert(str(old), output=tmp_path / "old-dpn")
    export(tmp_path / "old-dpn", tmp_path / "out", ExportOptions(uncalibrated=True))
    assert len(stored(tmp_path / "out")) == len(stored(tmp_path / "old-dpn")) - 2


@pytest.mark.parametrize(
    ("size", "nbytes"), [("2GB", 2 * 10**9), ("1.5 MB", 1_500_000), ("5", 5), ("700", 700), ("1KiB", 1024)]
)
def test_sizes(size: str, nbytes: int) -> None:
    assert parse_size(size) == nbytes


@pytest.mark.parametrize("size", ["", "big", "-1GB", "0", "2 parsecs", "1e9", "9" * 400])
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(size)


def test_exporting_as_it_is_imports_no_torch(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from dpn_cli.exporting.export import export;"
    code += "export(*map(Path, sys.argv[1:])); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(make_converted()), str(tmp_path / "out")], check=True)


def test_licence_and_base_model_are_carried_over(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpn_cli.checkpoint.source import Source

    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    (source / "README.md").write_text("---\nlicense: llama2\nlanguage: en\n---\n# LLaVA\n")
    monkeypatch.setattr(
        "dpn_cli.conversion.convert.resolve_source",
        lambda _: Source(source, "llava", "llava-hf/llava-1.5-7b-hf", "abc"),
    )
    convert("llava", output=tmp_path / "llava-dpn")
    export(tmp_path / "llava-dpn", tmp_path / "out", ExportOptions(quantize="int8", uncalibrated=True))
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "llama2" and head["base_model"] == "llava-hf/llava-1.5-7b-hf"
    assert head["base_model_relation"] == "quantized" and "model's (llama2)" in card


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_value_that_is_no_number_is_refused_unless_asked_for(
    make_converted: Callable[..., Path], tmp_path: Path, dtype: str | None
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = make_converted()
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["vision_tower.vision_model.post_layernorm.bias"][1] = np.nan
    save_file(tensors, file)
    expected = rf"{file.name}: the tensor 'vision_tower\.vision_model\.post_layernorm\.bias' holds NaN"
    with pytest.raises(CheckpointError, match=expected):
        export(folder, tmp_path / "out", ExportOptions(dtype=dtype))
    assert not (tmp_path / "out").exists()
    export(folder, tmp_path / "out", ExportOptions(dtype=dtype, check_values=False))


def test_what_no_option_changes_is_verified(
    make_converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_converted()
    done = export(folder, tmp_path / "out", ExportOptions(verify=True))
    assert done.num_verified == done.num_tensors
    cast = export(folder, tmp_path / "bf16", ExportOptions(dtype="bf16", verify=True))
    assert cast.num_verified == 30, "the routers'"

    def write_badly(stage: Path, *_: Any) -> None:
        write_weights(stage, *_)
        with (stage / "model.safetensors").open("r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"\x5a")

    monkeypatch.setattr("dpn_cli.exporting.export.write_weights", write_badly)
    with pytest.raises(DpnError, match="with other bytes than it was written with"):
        export(folder, tmp_path / "bad", ExportOptions(verify=True))
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("options", [ExportOptions(verify=True), ExportOptions(verify=True, dtype="bf16")])
def test_progress_counts_every_byte_once(tiny_llava: Path, tmp_path: Path, options: ExportOptions) -> None:
    heard, folder = Heard(), convert(str(tiny_llava), output=tmp_path / "converted").output
    options = replace(options, uncalibrated=True, check_values=True)
    export(folder, tmp_path / "out", options, reporter=heard.reporter)
    announced, told = heard.bytes["writing weights"]
    assert announced == told == Checkpoint.open(folder).nbytes
    announced, told = heard.bytes["verifying"]
    assert announced == told > 0
