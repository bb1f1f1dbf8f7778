import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.inspection import inspect_checkpoint
from dpn_cli.checkpoint.source import Source
from dpn_cli.checkpoint.writer import copy_file
from dpn_cli.conversion import opening
from dpn_cli.conversion.convert import convert, default_recipe
from dpn_cli.errors import CheckpointError, DpnError, RecipeError, UsageError
from dpn_cli.exporting.export import export
from dpn_cli.families.family import ALIASES
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.converted import pretend_calibration
from tests.heard import Heard
from tests.originals import Original
from tests.pyramids import POOLING, RATES, prompt


def arrays(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    checkpoint = Checkpoint.open(folder)
    loaded = {file: load_file(folder / file) for file in checkpoint.files}
    return {name: loaded[tensor.file][name] for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize(
    ("text", "layout", "shards"),
    [("llama", "hub", 1), ("mistral", "hub", 2), ("qwen2", "new", 1), ("qwen3", "hub", 1), ("llama", "new", 2)],
)
def test_the_original_is_there_byte_for_byte(
    tiny_llava_factory: Callable[..., Path], tmp_path: Path, text: str, layout: str, shards: int
) -> None:
    source = tiny_llava_factory(text=text, layout=layout, shards=shards)
    done = convert(str(source), output=tmp_path / "out")
    originals = {path.read_bytes() for path in source.glob("*.safetensors")}
    copies = {path.read_bytes() for path in done.output.glob("model*.safetensors")}
    assert copies == originals
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        assert (done.output / name).read_bytes() == (source / name).read_bytes()
    assert not (done.output / "model.safetensors").exists()  # it would shadow the index


ROPE = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0,
     "original_max_position_embeddings": 1024},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 1024},
)  # fmt: skip


@pytest.mark.parametrize("rope", ROPE, ids=lambda rope: rope["rope_type"])
def test_every_kind_of_rope_gives_the_originals_logits(
    tiny_llava: Path, tmp_path: Path, rope: dict[str, object]
) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    import dpn_cli

    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    (source / "config.json").write_text(json.dumps(config))
    model = dpn_cli.load(convert(str(source), output=tmp_path / "out").output)
    inputs = prompt(1, 3, 4, seed=0)
    with torch.inference_mode():
        expected = LlavaForConditionalGeneration.from_pretrained(source)(**inputs).logits
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-4)


def test_the_index_and_config_are_complete(tiny_llava: Path, tmp_path: Path) -> None:
    done = convert(str(tiny_llava), output=tmp_path / "out")
    before, after = Checkpoint.open(tiny_llava), Checkpoint.open(done.output)
    assert set(after.tensors) == set(before.tensors) | set(done.added)
    assert after.config["model_type"] == "dpn_llava"
    assert after.config["architectures"] == ["DpnLlavaForConditionalGeneration"]
    changed = {"model_type", "architectures", "pyramid", "base_model"}
    assert {k: v for k, v in after.config.items() if k not in changed} == {
        k: v for k, v in before.config.items() if k not in changed
    }
    pyramid = PyramidConfig.from_dict(after.config["pyramid"])
    assert replace(pyramid, answer_cue=()) == done.pyramid
    index = json.loads((done.output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == after.nbytes
    assert json.loads((done.output / "dpn_recipe.json").read_text())["name"] == done.recipe


def test_a_config_is_read_as_transformers_reads_it(tiny_llava: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llava, tmp_path / "in"))
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": None}
    del config["vision_config"]["model_type"]
    (source / "config.json").write_text(json.dumps(config))
    plain, done = (
        convert(str(each), output=tmp_path / name).output for name, each in (("a", tiny_llava), ("b", source))
    )
    assert inspect_checkpoint(source).parts
    before, after = (Checkpoint.open(folder).config | {"base_model": ""} for folder in (plain, done))
    assert after == before


def test_new_tensors_start_lossless(tiny_llava: Path, tmp_path: Path) -> None:
    recipe = load_recipe("demo", [*POOLING, "pyramid.pooling=conv"])
    done = convert(str(tiny_llava), recipe, tmp_path / "out")
    added = {n.removeprefix("language_model.model."): a for n, a in arrays(done.output).items() if n in done.added}
    assert {name: a.shape for name, a in added.items()} == done.pyramid.dpe_tensors(64)
    assert all(a.dtype == np.float32 for a in added.values())
    for site in range(3):
        assert (added[f"routers.{site}.norm.weight"] == 1).all()
        for name in ("norm.bias", "hidden.bias", "head.weight", "head.bias"):
            assert (added[f"routers.{site}.{name}"] == 0).all()
        assert 0.015 < added[f"routers.{site}.hidden.weight"].std() < 0.025
        for expert, (height, width) in enumerate(RATES):
            np.testing.assert_allclose(added[f"poolers.{site}.{expert}"].sum((1, 2)), 1, rtol=1e-6)
            assert added[f"poolers.{site}.{expert}"].shape == (64, height, width)


def test_two_conversions_are_the_same_bytes(tiny_llava: Path, tmp_path: Path) -> None:
    folders = [convert(str(tiny_llava), output=tmp_path / name).output for name in ("a", "b")]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]


def test_code_weights_of_other_kinds_and_the_readme_stay_behind(tiny_llava: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    for name in ("pytorch_model.bin", "modeling_x.py", "README.md", ".gitattributes", "old.safetensors"):
        (source / name).write_text("x")
    (source / "LICENSE").write_text("licence")
    output = convert(str(source), output=tmp_path / "out").output
    expected = {path.name for path in tiny_llava.iterdir()} - {"model.safetensors"} | {
        "LICENSE", "dpe.safetensors", "dpn_recipe.json", "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    }  # fmt: skip
    assert {path.name for path in output.iterdir()} == expected


def test_a_dry_run_checks_and_writes_nothing(tiny_llava: Path, tmp_path: Path) -> None:
    done = convert(str(tiny_llava), output=tmp_path / "out", dry_run=True)
    assert done.added_parameters > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError):
        convert(str(tiny_llava), output=tmp_path / "out", dry_run=True)


def test_the_default_output_is_named_after_the_model(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tiny_llava, tmp_path / "elsewhere" / "my llava")
    assert convert("elsewhere/my llava").output == Path("my llava-dpn")
    assert (tmp_path / "my llava-dpn" / "config.json").is_file()


def test_what_cannot_be_converted_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    converted = convert(str(tiny_llava), output=tmp_path / "out").output
    with pytest.raises(CheckpointError, match="already a pyramid"):
        convert(str(converted), output=tmp_path / "twice")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        convert(str(tmp_path), output=tmp_path / "x")
    with pytest.raises(RecipeError, match="do not fit"):
        convert(str(tiny_llava), load_recipe("demo", ["pyramid.sites=[{after_layer: 20}]"]), tmp_path / "x")
    with pytest.raises(RecipeError, match="no router width"):
        convert(str(tiny_llava), load_recipe("demo", ["pyramid.router.hidden_ratio=100"]), tmp_path / "x")
    with pytest.raises(UsageError, match="overlaps"):
        convert(str(tiny_llava), output=tiny_llava / "inside")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "origin", "recipe"),
    [
        ("llava-1.5-13b", ALIASES["llava-1.5-13b"], "llava-1.5-13b"),
        ("llava-1.5-13b-hf", ALIASES["llava-1.5-13b"], "llava-1.5-13b"),
        ("llava-hr-7b", ALIASES["llava-hr-7b"], "llava-hr-7b"),
        ("llava-hr-13b-x-sft-1024", ALIASES["llava-hr-x-13b"], "llava-hr-x-13b"),
        ("demo", "demo", "demo"),
        ("my-model", "my-model", "llava-1.5-7b"),
        ("llava-1.6-vicuna-7b", ALIASES["llava-1.6-vicuna-7b"], "llava-next"),
        ("llava-onevision-7b", ALIASES["llava-onevision-7b"], "llava-onevision"),
    ],
)
def test_the_recipe_follows_the_model(tmp_path: Path, name: str, origin: str, recipe: str) -> None:
    model_type = {"llava-next": "llava_next", "llava-onevision": "llava_onevision"}.get(recipe, "llava")
    assert default_recipe(Source(tmp_path, name, origin), {"model_type": model_type}) == recipe


def test_weights_that_the_config_names_are_those_that_count(tiny_llava: Path, tmp_path: Path) -> None:
    """As transformers takes them: `transformers_weights` goes before the usual names."""
    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    (source / "model.safetensors").rename(source / "weights.safetensors")
    (source / "model.safetensors").write_bytes(b"of another time")
    config = json.loads((source / "config.json").read_text()) | {"transformers_weights": "weights.safetensors"}
    (source / "config.json").write_text(json.dumps(config))
    done = convert(str(source), output=tmp_path / "out", verify=True)
    assert (done.output / "weights.safetensors").read_bytes() == (source / "weights.safetensors").read_bytes()
    assert "transformers_weights" not in json.loads((done.output / "config.json").read_text())


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shards", [1, 2])
def test_linked_shards_are_the_source_and_never_written_through(
    tiny_llava_factory: Callable[..., Path], tmp_path: Path, shards: int
) -> None:
    source = Path(shutil.copytree(tiny_llava_factory(shards=shards), tmp_path / "source"))
    before = fingerprint(source)
    done = convert(str(source), output=tmp_path / "out", link=True, verify=True)
    assert done.placement in ("linked", "cloned")
    if done.placement == "linked":
        assert {file.stat().st_nlink for file in source.glob("*.safetensors")} == {2}
    copied = convert(str(source), output=tmp_path / "copied")
    assert fingerprint(done.output) == fingerprint(copied.output)
    pretend_calibration(done.output)
    export(done.output, tmp_path / "exported")
    convert(str(source), output=done.output, force=True, link=True)
    shutil.rmtree(done.output)
    assert fingerprint(source) == before


def test_what_is_linked_needs_no_space(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = (64 << 20) + 10**6
    assert (tiny_llava / "model.safetensors").stat().st_size > 10**6
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(DpnError, match="free"):
        convert(str(tiny_llava), output=tmp_path / "out")
    assert convert(str(tiny_llava), output=tmp_path / "out", link=True).placement != "copied"


def test_a_shard_in_the_place_of_the_pyramids_own_is_refused(
    tiny_llava_factory: Callable[..., Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_llava_factory(shards=2), tmp_path / "source"))
    (source / "model-00002-of-00002.safetensors").rename(source / "dpe.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002", "dpe"))
    before = fingerprint(source)
    with pytest.raises(CheckpointError, match=r"a shard named dpe\.safetensors"):
        convert(str(source), output=tmp_path / "out", link=True)
    assert fingerprint(source) == before


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_checked_before_anything_is_written(tiny_llava: Path, tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), output=tmp_path / "out", check_values=True, dry_run=True)
    name = "language_model.model.layers.3.mlp.up_proj.weight"
    tensors[name][5, 7] = -torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: the tensor '{name}' holds NaN or infinite"):
        convert(str(source), output=tmp_path / "out", check_values=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(str(source), output=tmp_path / "out")


def test_what_was_written_wrongly_is_found(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_badly(source: Path, target: Path, *told: Callable[[int], None]) -> None:
        copy_file(source, target, *told)
        if target.suffix == ".safetensors":
            with target.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")

    monkeypatch.setattr(opening, "copy_file", copy_badly)
    with pytest.raises(DpnError, match="reads back from model-00001-of-00001"):
        convert(str(tiny_llava), output=tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_a_rewritten_model_is_checked_and_verified_too(make_original: Callable[..., Original], tmp_path: Path) -> None:
    import torch

    original = make_original()
    tower = str(original.clip)
    done = convert(
        str(original.folder), output=tmp_path / "out", vision_tower=tower, link=True, check_values=True, verify=True
    )
    assert done.placement == "rewritten"
    broken = Path(shutil.copytree(original.folder, tmp_path / "broken"))
    shard = sorted(broken.glob("*.bin"))[0]
    tensors = torch.load(shard, weights_only=True)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] = torch.nan
    torch.save(tensors, shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: the tensor '.*q_proj.weight' holds NaN"):
        convert(str(broken), output=tmp_path / "bad", vision_tower=tower, check_values=True)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("is_original", [False, True])
def test_progress_counts_every_byte_once(
    tiny_llava_factory: Callable[..., Path],
    make_original: Callable[..., Original],
    tmp_path: Path,
    is_original: bool,
    link: bool,
) -> None:
    heard, tower = Heard(), None
    source = tiny_llava_factory(shards=2)
    if is_original:
        original = make_original()
        source, tower = original.folder, str(original.clip)
    convert(
        str(source), None, tmp_path / "out", vision_tower=tower, link=link, check_values=True, verify=True,
        reporter=heard.reporter,
    )  # fmt: skip
    steps = ["checking values", "writing weights", *([] if link and not is_original else ["verifying"])]
    assert list(heard.bytes) == steps
    assert all(announced == told > 100_000 for announced, told in heard.bytes.values())
