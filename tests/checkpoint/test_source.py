import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.source import resolve_source
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import CheckpointError
from dpn_cli.families.family import ALIASES
from tests.hr import Hr
from tests.originals import Original
from tests.pyramids import prompt
from tests.tiled import tiled_prompt

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache on a machine that is offline."""
    from huggingface_hub import constants

    cache = tmp_path / "hub cache"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return cache


def put_in_cache(
    cache: Path, repo_id: str, folder: Path, leave_out: str = "", revision: str = "main", commit: str = COMMIT
) -> Path:
    """Store a checkpoint as the hub's client does: blobs, and a snapshot of links to them."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for part in (repo / "blobs", repo / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    for i, file in enumerate(path for path in sorted(folder.iterdir()) if path.name != leave_out):
        blob = repo / "blobs" / f"{commit[:8]}{i:056x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_wins_over_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava-1.5-7b").mkdir()
    source = resolve_source("llava-1.5-7b")
    assert source.path.samefile(tmp_path / "llava-1.5-7b")
    assert (source.name, source.revision) == ("llava-1.5-7b", None)


def test_a_folder_is_named_as_the_user_named_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    assert resolve_source(f"{tmp_path}/link/").name == "link"
    monkeypatch.chdir(folder)
    assert resolve_source(".").name == "model"


@pytest.mark.parametrize("shards", [1, 2])
def test_an_alias_is_found_in_the_hub_cache(
    tiny_llava_factory: Callable[..., Path], hub_cache: Path, shards: int
) -> None:
    repo_id = ALIASES["llava-1.5-7b"]
    snapshot = put_in_cache(hub_cache, repo_id, tiny_llava_factory(shards=shards))
    source = resolve_source("llava-1.5-7b")
    assert source.path.samefile(snapshot)
    assert (source.name, source.origin, source.revision) == ("llava-1.5-7b", repo_id, COMMIT)
    assert resolve_source(repo_id).name == "llava-1.5-7b-hf"


def test_a_model_of_the_hub_is_converted_under_its_short_name(
    tiny_llava: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo_id = ALIASES["llava-1.5-13b"]
    put_in_cache(hub_cache, repo_id, tiny_llava)
    monkeypatch.chdir(tmp_path)
    done = convert("llava-1.5-13b")
    assert (done.output, done.recipe) == (Path("llava-1.5-13b-dpn"), "llava-1.5-13b")
    assert Checkpoint.open(done.output).config["base_model"] == f"{repo_id}@{COMMIT}"
    assert not any(path.is_symlink() for path in done.output.iterdir())


def test_a_revision_of_a_model_of_the_hub_is_that_one(
    make_converted: Callable[..., Path], hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from huggingface_hub import constants

    import dpn_cli

    folder = make_converted()
    put_in_cache(hub_cache, "me/tiny", folder, leave_out="calibration")
    config = json.loads((folder / "config.json").read_text())
    config["pyramid"]["calibration"]["data"] = "second"
    (folder / "config.json").write_text(json.dumps(config))
    put_in_cache(hub_cache, "me/tiny", folder, leave_out="calibration", revision="v2", commit=COMMIT[::-1])
    assert [resolve_source(f"me/tiny{at}").reference for at in ("", "@main", "@v2", f"@{COMMIT[::-1]}")] == [
        f"me/tiny@{COMMIT}", f"me/tiny@{COMMIT}", *[f"me/tiny@{COMMIT[::-1]}"] * 2
    ]  # fmt: skip
    assert resolve_source(str(hub_cache / "models--me--tiny")).reference == f"me/tiny@{COMMIT}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    models = [dpn_cli.load("me/tiny", revision=revision, cache_dir=hub_cache) for revision in (None, "v2")]
    assert [model.pyramid.calibration["data"] for model in models] == ["mydata|2.json", "second"]
    both = dpn_cli.load("me/tiny@main", revision="v2", cache_dir=hub_cache)
    assert both.pyramid.calibration["data"] == "second"
    with pytest.raises(CheckpointError, match=r"at that revision.*hf download me/tiny --revision v3"):
        dpn_cli.load("me/tiny@v3", cache_dir=hub_cache)
    assert dpn_cli.load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"takes no config, variant: it loads a checkpoint as it is"):
        dpn_cli.load(folder, variant="x", config=None)
    with pytest.raises(TypeError, match=r"takes no use_cash: it loads a checkpoint as it is"):
        dpn_cli.load(folder, use_cash=False)


# What the text_config of each model on the hub says beside the sizes; None stands for what it leaves out.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava-1.6-vicuna-7b": ("llama", {"max_position_embeddings": 4096}),
    "llava-1.6-mistral-7b": ("mistral", {"max_position_embeddings": 32768, "sliding_window": None}),
    "llava-onevision-7b": ("qwen2", {"max_position_embeddings": 32768, "use_sliding_window": False}),
    "llava-1.5-7b": ("llama", {"max_position_embeddings": 4096}),
    "llava-1.5-13b": ("llama", {"max_position_embeddings": 4096}),
    "bakllava": ("mistral", {"max_position_embeddings": 32768, "sliding_window": None}),
    "llava-llama-3-8b": ("llama", {"max_position_embeddings": 8192, "rope_parameters": None, "rope_theta": 500000.0}),
}


@pytest.mark.parametrize(
    "alias",
    [
        pytest.param(alias, marks=pytest.mark.slow if alias in ("llava-1.6-vicuna-7b", "llava-1.5-13b") else [])
        for alias in VARIANTS
    ],
)
def test_every_alias_converts_to_a_model_with_the_same_logits(
    tiny_llava_factory: Callable[..., Path],
    tiny_tiled: Callable[..., Path],
    hub_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alias: str,
) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    import dpn_cli

    text, changes = VARIANTS[alias]
    family = {"llava-1.6": "llava_next", "llava-one": "llava_onevision"}.get(alias[:9])
    made = tiny_tiled(family, text) if family else tiny_llava_factory(text=text, shards=2)
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {k: v for k, v in (config["text_config"] | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    snapshot = put_in_cache(hub_cache, ALIASES[alias], folder)
    monkeypatch.chdir(tmp_path)
    output = convert(alias).output
    assert output == Path(f"{alias}-dpn")
    model = dpn_cli.load(output)
    inputs = tiled_prompt(model, [(30, 70)], 3, 4, seed=0) if family else prompt(1, 3, 4, seed=0)
    with torch.inference_mode():
        expected = AutoModelForImageTextToText.from_pretrained(snapshot)(**inputs).logits
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("alias", sorted(ALIASES.keys() - VARIANTS))
def test_the_aliases_of_llava_hr_convert_from_the_original_layout(
    make_hr: Callable[..., Hr], hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alias: str
) -> None:
    put_in_cache(hub_cache, ALIASES[alias], make_hr().original.folder)
    monkeypatch.chdir(tmp_path)
    done = convert(alias)
    assert (done.output, done.recipe, done.layout.grid) == (Path(f"{alias}-dpn"), alias, (8, 8))


@pytest.mark.parametrize("leave_out", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_part_of_a_model_in_the_cache_asks_for_the_rest(
    tiny_llava_factory: Callable[..., Path], hub_cache: Path, leave_out: str
) -> None:
    put_in_cache(hub_cache, "owner/model", tiny_llava_factory(shards=2), leave_out)
    with pytest.raises(CheckpointError, match="download the checkpoint again"):
        Checkpoint.open(resolve_source("owner/model").path)


def test_a_snapshot_without_a_processor_is_completed_where_the_hub_can_be_reached(
    tiny_llava: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that loads only the model leaves such a snapshot."""
    import huggingface_hub

    part = tmp_path / "part"
    part.mkdir()
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(tiny_llava / file, part)
    put_in_cache(hub_cache, "me/llava", part)
    assert names(resolve_source("me/llava").path) == names(part)
    download = huggingface_hub.snapshot_download

    def snapshot_download(repo_id: str, local_files_only: bool = False, **kwargs: Any) -> str:
        if not local_files_only:
            put_in_cache(hub_cache, repo_id, tiny_llava, commit="f" * 40)
        return download(repo_id, local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert names(resolve_source("me/llava").path) == names(tiny_llava)


def test_pickles_are_fetched_only_where_there_are_no_safetensors(
    make_original: Callable[..., Original], tiny_llava: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[bool] = []
    download = huggingface_hub.snapshot_download

    def snapshot_download(repo_id: str, local_files_only: bool = False, **kwargs: Any) -> str:
        if local_files_only:
            return download(repo_id, local_files_only=True)
        asked.append(any(pattern.endswith(".bin") for pattern in kwargs["allow_patterns"]))
        if repo_id == "owner/new" or asked[-1]:
            put_in_cache(hub_cache, repo_id, {"owner/new": tiny_llava, "openai/clip": original.clip}[repo_id])
        return str(hub_cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / COMMIT)

    original = make_original()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert (resolve_source("owner/new").path / "model.safetensors").is_file()
    assert asked == [False]
    assert (resolve_source("openai/clip").path / "pytorch_model.bin").is_file()
    assert asked == [False, False, True]
    assert resolve_source("openai/clip").revision == COMMIT  # from the cache
    assert len(asked) == 3


def test_the_vision_tower_that_an_original_names_is_found(
    make_original: Callable[..., Original], hub_cache: Path, tmp_path: Path
) -> None:
    original = make_original()
    with pytest.raises(CheckpointError, match=r"needs the vision tower openai/clip-vit-large-patch14-336.*--vision-to"):
        convert(str(original.folder), output=tmp_path / "out")
    put_in_cache(hub_cache, "openai/clip-vit-large-patch14-336", original.clip)
    assert convert(str(original.folder), output=tmp_path / "out").placement == "rewritten"


@pytest.mark.usefixtures("hub_cache")
def test_offline_the_error_says_how_to_go_on() -> None:
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set.*hf download llava-hf/llava-1\.5-13b-hf"):
        resolve_source("llava-1.5-13b")


@pytest.mark.parametrize("model", ["nowhere", "/no/such/folder", "../nowhere", "llava-1.5-7", "a/b--c"])
def test_a_missing_path_is_one_sentence(model: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_source(model)


def test_an_alias_is_suggested() -> None:
    with pytest.raises(CheckpointError, match=r"Did you mean 'llava-1\.5-13b'"):
        resolve_source("llava-1.5-13")


@pytest.mark.parametrize("spelling", ["{snapshot}", "{snapshot}/", "{cache}/link", "."])
def test_a_snapshot_by_its_path_is_named_as_the_model_on_the_hub(
    tiny_llava: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], spelling: str,
) -> None:  # fmt: skip
    from dpn_cli.cli import main

    repo_id = ALIASES["llava-1.5-13b"]
    snapshot = put_in_cache(hub_cache, repo_id, tiny_llava)
    (hub_cache / "link").symlink_to(snapshot)
    monkeypatch.chdir(snapshot if spelling == "." else tmp_path)
    model = spelling.format(snapshot=snapshot, cache=hub_cache)
    source = resolve_source(model)
    assert source.name == ("link" if "link" in model else "llava-1.5-13b-hf")
    assert (source.reference, source.revision) == (f"{repo_id}@{COMMIT}", COMMIT)
    monkeypatch.chdir(tmp_path)
    if spelling == "{snapshot}":
        assert main(["convert", model]) == 0
        assert f"{repo_id}@{COMMIT} → llava-1.5-13b-hf-dpn (recipe llava-1.5-13b)" in capsys.readouterr().out
        assert Checkpoint.open(Path("llava-1.5-13b-hf-dpn")).config["base_model"] == f"{repo_id}@{COMMIT}"
        assert main(["inspect", model]) == 0
        assert f"{repo_id}@{COMMIT} (llava)" in capsys.readouterr().out


def test_an_export_of_a_snapshot_is_named_as_on_the_hub(
    make_converted: Callable[..., Path], hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpn_cli.cli import main

    snapshot = put_in_cache(hub_cache, "me/tiny-dpn", make_converted(calibrated=False))
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--model", str(snapshot), "--uncalibrated"]) == 0
    assert (tmp_path / "tiny-dpn-export" / "config.json").is_file()
