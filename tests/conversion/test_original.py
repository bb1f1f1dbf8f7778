"""The original LLaVA layout converts to the model that Hugging Face's layouts hold."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dpn_cli
from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.inspection import inspect_checkpoint
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import CheckpointError
from dpn_cli.families.tensors import COMPUTED, llava_tensors
from dpn_cli.pyramid.config import DPE_PARTS
from tests.faults.damage import put
from tests.originals import Original, write_hugging_face
from tests.runs import digests


def inputs(image: int) -> dict[str, torch.Tensor]:
    """Return one prompt with one picture."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(3, 300, (12,), generator=generator).tolist()
    ids = [1, *text[:5], *[image] * 144, *text[5:]]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(1, 3, 48, 48, generator=generator)}


@torch.inference_mode()
def logits(model: Any, rows: int) -> torch.Tensor:
    """Return the logits of the words that every copy of a model has."""
    return model(**inputs(rows)).logits[..., :rows]


def converted(original: Original, output: Path, **options: Any) -> Path:
    return convert(str(original.folder), output=output, vision_tower=str(original.clip), **options).output


def test_every_layout_of_one_model_gives_the_same_logits(
    make_original: Callable[..., Original], tmp_path: Path
) -> None:
    original = make_original()
    expected = logits(original.reference(), original.rows)
    assert torch.equal(logits(dpn_cli.load(converted(original, tmp_path / "a")), original.rows), expected)
    for layout, files in (("hub", "safetensors"), ("new", "safetensors"), ("hub", "bin"), ("new", "old bin")):
        source = write_hugging_face(original, tmp_path / f"{layout} {files}", layout, files)
        output = convert(str(source), output=tmp_path / f"{layout} {files} dpn").output
        assert torch.equal(logits(dpn_cli.load(output), original.rows), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"files": "safetensors", "tower_inside": True},
        {"files": "old bin", "projector": "linear"},
        {"text": "mistral", "tied": True},
        {"dtype": torch.float16, "projector": "linear"},
        {"dtype": torch.bfloat16, "added": ("<im_patch>",)},
    ],
    ids=str,
)
def test_its_variants_are_read(make_original: Callable[..., Original], tmp_path: Path, options: dict[str, Any]) -> None:
    original = make_original(**options)
    before = digests(original.folder)
    folder = converted(original, tmp_path / "out")
    model = dpn_cli.load(folder)
    assert model.dtype == original.config.dtype
    assert torch.equal(logits(model, original.rows), logits(original.reference(), original.rows))
    assert digests(original.folder) == before


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "written",
    [
        {"rope_parameters": {"rope_theta": 500_000.0, **LINEAR}},
        {"rope_parameters": None, "rope_theta": 500_000.0, "rope_scaling": LINEAR},
    ],
    ids=["transformers 5", "transformers 4"],
)
def test_positions_are_those_of_the_original(
    make_original: Callable[..., Original], tmp_path: Path, written: dict[str, Any]
) -> None:
    original = make_original()
    original.edit(**written)
    original = replace(original, config=deepcopy(original.config))  # other tests have the same one
    plain = logits(original.reference(), original.rows)
    original.config.text_config.rope_parameters = {"rope_theta": 500_000.0, **LINEAR}
    expected = logits(original.reference(), original.rows)
    assert not torch.allclose(plain, expected)
    assert torch.equal(logits(dpn_cli.load(converted(original, tmp_path / "out")), original.rows), expected)


def test_what_is_not_taken_over_is_said(make_original: Callable[..., Original], tmp_path: Path) -> None:
    original = make_original()
    original.edit(unfreeze_mm_vision_tower=True, mm_vision_tower=str(original.clip))
    put(original.folder / "tokenizer_config.json", "chat_template", value="{{ messages }}")
    tower, template = convert(str(original.folder), output=tmp_path / "a").notes
    assert "was trained" in tower and f"read from {original.clip};" in tower
    assert "in tokenizer_config.json is not taken" in template
    assert convert(str(original.folder), output=tmp_path / "b", vision_tower=str(original.clip)).notes == (template,)


@pytest.mark.parametrize(("layout", "files"), [("hub", "safetensors"), ("new", "bin")])
def test_tied_embeddings_mixed_dtypes_and_old_buffers_in_hugging_faces_layout(
    make_original: Callable[..., Original], tmp_path: Path, layout: str, files: str
) -> None:
    original = make_original(tied=True, dtype=torch.float16)
    original.tensors["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    original.tensors["model.vision_tower.embeddings.position_ids"] = torch.arange(145)[None]
    source = write_hugging_face(original, tmp_path / "in", layout, files)
    for name in [name for name in original.tensors if name.endswith(COMPUTED)]:
        del original.tensors[name]
    model = dpn_cli.load(convert(str(source), output=tmp_path / "out").output)
    assert torch.equal(logits(model, original.rows), logits(original.reference(), original.rows))


@pytest.mark.parametrize(
    ("window", "limit"), [(1000, 1000), pytest.param(4096, 2048, marks=pytest.mark.slow), (None, 2048)]
)
def test_a_sliding_window_becomes_a_limit(
    make_original: Callable[..., Original], tmp_path: Path, window: int | None, limit: int
) -> None:
    original = make_original(text="mistral")
    settings = json.loads((original.folder / "config.json").read_text()) | {"sliding_window": window}
    (original.folder / "config.json").write_text(json.dumps(settings))
    hub = write_hugging_face(original, tmp_path / "hub", "hub")
    settings = json.loads((hub / "config.json").read_text())
    settings["text_config"]["sliding_window"] = window
    (hub / "config.json").write_text(json.dumps(settings))
    for source, tower in ((original.folder, str(original.clip)), (hub, None)):
        done = convert(str(source), output=tmp_path / f"{source.name}-dpn", vision_tower=tower)
        assert len(done.notes) == (window is not None)
        text = Checkpoint.open(done.output).config["text_config"]
        assert (text["sliding_window"], text["max_position_embeddings"]) == (None, limit)
        assert torch.equal(logits(dpn_cli.load(done.output), 340), logits(original.reference(), 340))


def test_a_head_that_tied_embeddings_replace_is_named(make_original: Callable[..., Original], tmp_path: Path) -> None:
    original = make_original(tied=True)
    original.add({"lm_head.weight": torch.ones(original.rows, 64)})
    done = convert(str(original.folder), output=tmp_path / "out", vision_tower=str(original.clip))
    assert done.notes == ("Tensors that nothing uses are left out: 1, such as lm_head.weight.",)
    assert torch.equal(logits(dpn_cli.load(done.output), 340), logits(original.reference(), 340))


def test_nothing_of_the_original_is_lost(make_original: Callable[..., Original], tmp_path: Path) -> None:
    original = make_original(dtype=torch.float16)
    folder = converted(original, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {
        "LICENSE.txt", "chat_template.jinja", "config.json", "dpe.safetensors", "dpn_recipe.json",
        "generation_config.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors", "model.safetensors.index.json", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    checkpoint = Checkpoint.open(folder)
    pyramid = {name for name in checkpoint.tensors if any(part in name for part in DPE_PARTS)}
    assert {name: t.shape for name, t in checkpoint.tensors.items() if name not in pyramid} == llava_tensors(
        checkpoint.config
    )
    dtypes = {name: t.dtype for name, t in checkpoint.tensors.items() if name not in pyramid}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("vision_tower.")} == {"F32"}  # as stored
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("vision_tower.")} == {"F16"}
    config = checkpoint.config
    assert (config["image_token_index"], config["pad_token_id"]) == (340, 341)
    assert config["text_config"]["vocab_size"] == 384
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 341,
    }  # fmt: skip


def test_two_conversions_are_the_same_bytes(
    make_original: Callable[..., Original], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make_original()
    first = converted(original, tmp_path / "a")
    monkeypatch.setattr("dpn_cli.conversion.bins.REMAP_BYTES", 0)  # every tensor from a fresh mapping
    second = converted(original, tmp_path / "b")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "projector": ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type 'mlp3x_gelu'.*expected linear or mlp2x_gelu"),
    "another projector than stored": ({"mm_projector_type": "linear"}, "weights have .*linear_1"),
    "class token": ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
    "anyres": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
    "start and end tokens": ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    "LLaVA-HR's config": ({"is_multipath_encoder": True}, "is_multipath_encoder, but .*fast_vision.* is missing"),
    "language model": ({"architectures": ["LlavaQwenForCausalLM"]}, "LlavaQwenForCausalLM"),
    "quantised": ({"quantization_config": {}}, "quantised"),
    "no sizes": ({"num_hidden_layers": None}, "None as num_hidden_layers"),
    "impossible sizes": ({"num_attention_heads": 0}, "0 as num_attention_heads"),
    "impossible heads": ({"num_key_value_heads": "2"}, "'2' as num_key_value_heads"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "1000000000 decoder layers, the weights have 8"),
    "feature layer": ({"mm_vision_select_layer": "last"}, "'last' as mm_vision_select_layer"),
    "too few layers": ({"num_hidden_layers": 7}, "7 decoder layers, the weights have 8"),
    "too many layers": ({"num_hidden_layers": 9}, "9 decoder layers, the weights have 8"),
    "width": ({"hidden_size": 128}, "do not belong together"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_llava_15_is_refused(make_original: Callable[..., Original], tmp_path: Path, fault: str) -> None:
    original = make_original()
    changes, message = FAULTS[fault]
    original.edit(**changes)
    refused(original, tmp_path, message)


def refused(original: Original, tmp_path: Path, message: str) -> None:
    """Check that a conversion fails as a bad checkpoint, writes nothing and leaves the source alone."""
    before = digests(original.folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        converted(original, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert digests(original.folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "llava-v1.5-tiny"]


def truncate(folder: Path) -> None:
    path = folder / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-1000])


def with_code(folder: Path) -> None:
    torch.save({"x": Path("a pickled object")}, folder / "pytorch_model-00001-of-00002.bin")


def with_integers(folder: Path) -> None:
    path = folder / "pytorch_model-00001-of-00002.bin"
    torch.save({name: t.to(torch.int8) for name, t in torch.load(path).items()}, path)


def misplace(folder: Path) -> None:
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(path.read_text().replace("00001-of", "00002-of"))


def lead_out(folder: Path) -> None:
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(path.read_text().replace("pytorch_model-00001", "../pytorch_model-00001"))


def add_tensor(folder: Path) -> None:
    path = folder / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(path) | {"model.image_newline": torch.ones(64)}, path)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["model.image_newline"] = path.name
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def projector_only(folder: Path) -> None:
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    torch.save({"model.mm_projector.0.weight": torch.ones(64, 32)}, folder / "pytorch_model.bin")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "00002-of-00002.bin is truncated or damaged"),
    "empty": (lambda f: (f / "pytorch_model-00001-of-00002.bin").write_bytes(b""), "truncated or damaged"),
    "shard missing": (lambda f: (f / "pytorch_model-00001-of-00002.bin").unlink(), "00001-of-00002.bin is missing"),
    "LFS pointer": (
        lambda f: (f / "pytorch_model-00001-of-00002.bin").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "code": (with_code, "could run code"),
    "integers": (with_integers, "as I8, expected floating-point numbers"),
    "misplaced tensor": (misplace, "does not hold it"),
    "index leads out": (lead_out, "expected a .bin file in the same folder"),
    "another's tensor": (add_tensor, "'model.image_newline', which neither LLaVA-1.5 nor"),
    "projector only": (projector_only, "only a part of a model"),
    "no weights": (lambda f: [path.unlink() for path in f.glob("pytorch_model*")], "has no weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "neither tokenizer.json nor tokenizer.model"),
    "tokenizer damaged": (lambda f: (f / "tokenizer.model").write_bytes(b"xxxx"), "cannot be read as Llama"),
    "another tokenizer": (
        lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}'),
        "PreTrainedTokenizerFast",
    ),
    "more tokens than rows": (lambda f: (f / "added_tokens.json").write_text('{"x": 340}'), "do not belong together"),
    "gap in the tokens": (lambda f: (f / "added_tokens.json").write_text('{"x": 350}'), "gaps"),
    "LoRA": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}'),
        r"merge_lora_weights\.py --model-path .* --model-base lmsys/vicuna-7b-v1\.5",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_nothing_is_written(
    make_original: Callable[..., Original], tmp_path: Path, damage: str
) -> None:
    original = make_original()
    harm, message = DAMAGES[damage]
    harm(original.folder)
    refused(original, tmp_path, message)


def wrapped(folder: Path, *prefixes: str, inside: str = "") -> None:
    """Name the tensors of a folder's safetensors or .bin shards as a wrapped model has them."""

    def name(old: str) -> str:
        return "".join(prefixes) + old.replace(".layers.", f".{inside}layers.")

    if (whole := folder / "model.safetensors").exists():
        save_file({name(key): t for key, t in load_file(whole).items()}, whole, metadata={"format": "pt"})
    for shard in folder.glob("*.bin"):
        torch.save({name(key): tensor for key, tensor in torch.load(shard).items()}, shard)
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["weight_map"] = {name(key): file for key, file in index["weight_map"].items()}
        path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("layout", "files", "prefixes", "inside"),
    [
        ("original", "bin", ("module.",), ""),
        pytest.param("original", "safetensors", ("_orig_mod.", "module."), "", marks=pytest.mark.slow),
        pytest.param("hub", "safetensors", ("module.",), "", marks=pytest.mark.slow),
        ("new", "safetensors", ("module.", "_orig_mod."), ""),
        pytest.param("hub", "bin", ("_orig_mod.",), "", marks=pytest.mark.slow),
        ("hub", "safetensors", ("_fsdp_wrapped_module.",), "_checkpoint_wrapped_module."),
    ],
)
def test_what_wrappers_add_to_names_is_taken_off(
    make_original: Callable[..., Original], tmp_path: Path, layout: str, files: str, prefixes: tuple[str, ...],
    inside: str,
) -> None:  # fmt: skip
    original = make_original(files=files) if layout == "original" else make_original()
    if layout == "original":
        source, tower = original.folder, str(original.clip)
        wrapped(original.clip, *prefixes)
    else:
        source, tower = write_hugging_face(original, tmp_path / "in", layout, files), None
    wrapped(source, *prefixes, inside=inside)
    before = digests(source)
    done = convert(str(source), output=tmp_path / "out", vision_tower=tower, verify=True)
    assert all(part in done.notes[0] for part in (*prefixes, inside))
    assert torch.equal(logits(dpn_cli.load(done.output), original.rows), logits(original.reference(), original.rows))
    assert digests(source) == before


def test_weights_that_torch_has_averaged_are_converted(make_original: Callable[..., Original], tmp_path: Path) -> None:
    source = write_hugging_face(make_original(), tmp_path / "in", "hub")
    plain = convert(str(source), output=tmp_path / "plain").output
    path = source / "model.safetensors"
    averaged = {f"module.{name}": tensor for name, tensor in load_file(path).items()} | {"n_averaged": torch.tensor(3)}
    save_file(averaged, path, metadata={"format": "pt"})
    done = convert(str(source), output=tmp_path / "out", verify=True).output
    assert Checkpoint.open(done).tensors.keys() == Checkpoint.open(plain).tensors.keys()


@pytest.mark.parametrize(
    ("layout", "files", "prefix"),
    [
        ("hub", "safetensors", "base_model.model."),
        pytest.param("hub", "safetensors", "model.", marks=pytest.mark.slow),
        pytest.param("new", "safetensors", "_forward_module.", marks=pytest.mark.slow),
        ("new", "bin", "model."),
        ("hub", "bin", "state_dict.student."),
        ("original", "bin", "llava."),
    ],
)
def test_what_every_name_begins_with_is_taken_off(
    make_original: Callable[..., Original], tmp_path: Path, layout: str, files: str, prefix: str
) -> None:
    original = make_original(files=files) if layout == "original" else make_original()
    source, tower = original.folder, str(original.clip)
    if layout != "original":
        source, tower = write_hugging_face(original, tmp_path / "in", layout, files), None
    plain = convert(str(source), output=tmp_path / "plain", vision_tower=tower).output
    wrapped(source, prefix)
    done = convert(str(source), output=tmp_path / "out", vision_tower=tower, verify=True)
    assert f"{prefix} is taken off" in done.notes[0]
    expected, found = ({n: t.shape for n, t in Checkpoint.open(f).tensors.items()} for f in (plain, done.output))
    assert found == expected


def test_names_that_lead_nowhere_are_named(make_original: Callable[..., Original], tmp_path: Path) -> None:
    source = write_hugging_face(make_original(), tmp_path / "in", "hub")
    path = source / "model.safetensors"
    stored = load_file(path)
    behind = {f"ema.{name}": tensor for name, tensor in stored.items()}
    save_file(behind | {"step": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no tensor .* but ema\.language_model\.model\.embed_tokens\.weight"):
        convert(str(source), output=tmp_path / "out")
    save_file(stored | {"v_head.summary.weight": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"v_head\.summary\.weight', which the model of its config\.json"):
        convert(str(source), output=tmp_path / "out")
    unmerged = {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in stored.items()}
    trained = {name.replace("lm_head.", "lm_head.modules_to_save.default."): tensor for name, tensor in stored.items()}
    for names in (unmerged, {f"base_model.model.{name}": tensor for name, tensor in unmerged.items()}, trained):
        save_file(names, path, metadata={"format": "pt"})
        for act in (lambda: convert(str(source), output=tmp_path / "out"), lambda: inspect_checkpoint(source)):
            with pytest.raises(CheckpointError, match=r"unmerged adapter .*(base_|modules_to_).*: merge it first"):
                act()


def test_weights_that_were_not_gathered_are_named(make_original: Callable[..., Original], tmp_path: Path) -> None:
    original = make_original(files="safetensors")
    for folder in (original.folder, write_hugging_face(original, tmp_path / "in", "hub")):
        for path in folder.glob("*.safetensors"):
            stored = {name: each[:0].clone() if each.ndim > 1 else each for name, each in load_file(path).items()}
            save_file(stored, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"without its values, which DeepSpeed's ZeRO-3 had not gathered"):
            convert(str(folder), output=tmp_path / "out")


def test_wrappers_names_are_named_where_they_cannot_be_taken_off(
    make_original: Callable[..., Original], tmp_path: Path
) -> None:
    source = write_hugging_face(make_original(), tmp_path / "in", "hub")
    converted_folder = convert(str(source), output=tmp_path / "out").output
    wrapped(source, "module.")
    with pytest.raises(CheckpointError, match=r"wrapped model, with module\. in its names: `dpn convert .*` takes it"):
        inspect_checkpoint(source)
    for shard in converted_folder.glob("*.safetensors"):
        save_file({f"_orig_mod.{k}": t for k, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    index = converted_folder / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {f"_orig_mod.{k}": v for k, v in stored["weight_map"].items()}}))
    with pytest.raises(CheckpointError, match=r"with _orig_mod\. in its names: save the model inside"):
        dpn_cli.load(converted_folder)
    tensors = load_file(source / "model.safetensors")
    tensors |= {name.removeprefix("module."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"twice, with module\. in their names and without"):
        convert(str(source), output=tmp_path / "again")
