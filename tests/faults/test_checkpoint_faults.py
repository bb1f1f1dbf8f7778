"""Whatever is wrong with a checkpoint or its place: one sentence, the right exit code, and all is as it was before."""

import errno
import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpn_cli.checkpoint.staging import check_space
from dpn_cli.cli import main
from tests.faults.damage import (
    CONFIG,
    INDEX,
    LFS_POINTER,
    NORM,
    OTHER_SHARD,
    SHARD,
    Harm,
    both,
    cut,
    edit,
    overwrite,
    place,
    set_dtype,
    set_tensor,
)
from tests.faults.limited import largest_file

SOURCE, OUTPUT = "my llàva 模型", "öut put"  # every run is one with blanks and other alphabets in its paths
DPN = [sys.executable, "-c", "import sys; from dpn_cli.cli import main; sys.exit(main())"]
LAST_LAYER = "language_model.model.layers.7.mlp.up_proj.weight"
PART_OF_CLIP = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"

Listing = dict[str, str]

_open = os.open


def replaced_by(make: Callable[[Path], object], file: str = SHARD) -> Harm:
    """Put something else in a file's place."""
    return lambda folder: ((folder / file).unlink(), make(folder / file))


def without(*files: str) -> Harm:
    """Remove files."""
    return lambda folder: [(folder / file).unlink() for file in files]


def lora_alone(folder: Path) -> None:
    without(CONFIG, INDEX, SHARD, OTHER_SHARD)(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


# What dpn says of a damaged folder: convert and inspect alike.
HEADERS: dict[str, tuple[Harm, str]] = {
    "shard missing": (without(SHARD), "is missing: download"),
    "shard empty": (overwrite(SHARD, b""), "is truncated (0 bytes)"),
    "shard truncated": (cut(SHARD, -1), "truncated or damaged, download it again"),
    "header truncated": (cut(SHARD, 100), "is truncated or not a safetensors file"),
    "shard too long": (lambda f: (f / SHARD).open("ab").write(b"x"), "truncated or damaged"),
    "shard is an LFS pointer": (overwrite(SHARD, LFS_POINTER), "run `git lfs pull`"),
    "header of 2^40 bytes": (overwrite(SHARD, struct.pack("<Q", 1 << 40) + b"{}"), "should take 1099511627776 bytes"),
    "header is no JSON": (overwrite(SHARD, struct.pack("<Q", 4) + b"{{{{"), "damaged header"),
    "shard is a folder": (replaced_by(Path.mkdir), "is missing: download"),
    "shard is a pipe": (replaced_by(os.mkfifo), "is neither a file nor a folder"),
    "index is a list": (overwrite(INDEX, b"[]"), "holds a JSON list, expected an object"),
    "index is an LFS pointer": (overwrite(INDEX, LFS_POINTER), "not JSON but a Git LFS pointer"),
    "index without weight_map": (edit(INDEX, "weight_map"), "has no weight_map"),
    "index of numbers": (place(NORM, 3), "names the shard 3: expected a .safetensors file in the same folder"),
    "index of lists": (place(NORM, [SHARD]), "expected a .safetensors file in the same folder"),
    "index leads out": (place(NORM, f"../{SHARD}"), "expected a .safetensors file in the same folder"),
    "index is absolute": (place(NORM, f"/{SHARD}"), "expected a .safetensors file in the same folder"),
    "index names the wrong shard": (
        both(place(NORM, SHARD), place(LAST_LAYER, SHARD), place("language_model.lm_head.weight", OTHER_SHARD)),
        "which does not hold it",
    ),
    "tensor absent from its shard": (set_tensor(NORM, None), f"places the tensor '{NORM}'"),
    "tensor in two shards": (
        both(set_tensor(NORM, np.ones(64, np.float32), SHARD), set_tensor(NORM, np.ones(64, np.float32), OTHER_SHARD)),
        f"holds '{NORM}' in {SHARD} and in {OTHER_SHARD}, expected every tensor once",
    ),
    "no index": (without(INDEX), ".safetensors files, but no model.safetensors.index.json"),
    "no config": (without(CONFIG), "has no config.json"),
    "config is no JSON": (overwrite(CONFIG, b"{"), "is not JSON"),
    "config is deep": (overwrite(CONFIG, b"[" * 100_000), "is not JSON"),
    "config is an LFS pointer": (overwrite(CONFIG, LFS_POINTER), "Git LFS pointer"),
    "config without text_config": (edit(CONFIG, "text_config"), "no text_config"),
    "config without vision_config": (edit(CONFIG, "vision_config"), "no vision_config"),
    "config without image token": (edit(CONFIG, "image_token_index"), "no image_token_index"),
    "image token outside the vocabulary": (edit(CONFIG, "image_token_index", value=304), "image_token_index 304"),
    "config without model_type": (edit(CONFIG, "model_type"), "model type None"),
    "config of a text model": (
        both(edit(CONFIG, "model_type", value="llama"), edit(CONFIG, "vision_config")), "expected a LLaVA",
    ),
    "config of another size": (edit(CONFIG, "text_config", "hidden_size"), "do not belong together"),
    "config of another depth": (edit(CONFIG, "text_config", "num_hidden_layers"), "says 32 decoder layers"),
    "LoRA alone": (lora_alone, "merge it into its base model first, with peft's"),
    "LoRA beside": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge it into its base model first"),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], "has no config.json"),
}  # fmt: skip
# What only a conversion looks at: each tensor.
TENSORS: dict[str, tuple[Harm, str]] = {
    "tensor missing": (both(set_tensor(LAST_LAYER, None), place(LAST_LAYER)), "have no such tensor"),
    "part of the tower missing": (both(set_tensor(PART_OF_CLIP, None), place(PART_OF_CLIP)), "no such tensor"),
    "tensor of another shape": (set_tensor(LAST_LAYER, np.ones((128, 63), np.float32)), "asks for [128, 64]"),
    "scalar": (set_tensor(NORM, np.float32(1)[None].reshape(())), "asks for [64], the weights have []"),
    "empty tensor": (set_tensor(NORM, np.ones(0, np.float32)), "asks for [64], the weights have [0]"),
    "integers": (set_dtype(NORM, "I8", 8), "as I8, expected floating-point numbers"),
    "fp8": (set_dtype(NORM, "F8_E4M3", 8), "as F8_E4M3, expected floating-point numbers"),
    "tensor named as a path": (
        both(set_tensor("../../x", np.ones(1, np.float32), SHARD), place("../../x", SHARD)),
        "holds '../../x', which",
    ),
    "tensor outside the index": (set_tensor("../../x", np.ones(1, np.float32), SHARD), "holds '../../x', which"),
    "tensor of no LLaVA": (
        both(set_tensor("extra_row", np.ones(64, np.float32), SHARD), place("extra_row", SHARD)),
        "'extra_row'",
    ),
    "tensor under two names": (
        both(
            set_tensor("model.language_model.norm.weight", np.ones(64, np.float32), SHARD),
            place("model.language_model.norm.weight", SHARD),
        ),
        "under two names",
    ),
    "feature layer": (edit(CONFIG, "vision_feature_layer", value=7), "has no feature layer 7"),
    "vision size": (edit(CONFIG, "vision_config", "intermediate_size", value="64"), "impossible vision_config.interm"),
    ".bin alone, truncated": (
        both(without(INDEX, SHARD, OTHER_SHARD), overwrite("pytorch_model.bin", b"PK\x03\x04")),
        "truncated or damaged: download it again",
    ),
}  # fmt: skip


@pytest.fixture
def here(tiny_llava_factory: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds a sharded checkpoint, SOURCE, and nothing else."""
    place = tmp_path / "wörk here"
    place.mkdir()
    shutil.copytree(tiny_llava_factory(shards=2), place / SOURCE)
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def undisturbed(tiny_llava_factory: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Listing:
    """The files of a conversion that nothing went wrong with."""
    from dpn_cli.conversion.convert import convert

    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(tiny_llava_factory(shards=2), folder / SOURCE)
    return listing(convert(str(folder / SOURCE), output=folder / "out").output)


def listing(folder: Path) -> Listing:
    """Return what is below a folder, with a hash of every file."""

    def content(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def refused(args: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a command says one sentence, and leaves all that is here as it is."""
    before = listing(Path())
    assert main(args) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("Error: ") and captured.err.count("\n") == 1 and len(captured.err) < 600
    assert captured.out == ""
    assert listing(Path()) == before


def converts(undisturbed: Listing) -> None:
    """Check that the conversion of SOURCE succeeds and leaves nothing else."""
    assert main(["convert", SOURCE, "-o", OUTPUT]) == 0
    assert listing(Path(OUTPUT)) == undisturbed
    assert {path.name for path in Path().iterdir()} == {SOURCE, OUTPUT, ".dpn"}


@pytest.mark.parametrize("fault", [*HEADERS, *TENSORS])
def test_a_bad_checkpoint_is_refused(here: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    harm, message = (HEADERS | TENSORS)[fault]
    harm(here / SOURCE)
    refused(["convert", SOURCE, "-o", OUTPUT], 3, message, capsys)
    refused(["convert", SOURCE, "-o", OUTPUT, "--dry-run"], 3, message, capsys)
    if fault in HEADERS:
        refused(["inspect", SOURCE], 3, message, capsys)


@pytest.mark.parametrize("fault", ["shard truncated", "tensor missing", "vision size"])
def test_a_mended_checkpoint_is_converted(
    here: Path,
    tiny_llava_factory: Callable[..., Path],
    undisturbed: Listing,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    """The first fault is found in headers, the second among the tensors, the last when the model is built."""
    harm, message = (HEADERS | TENSORS)[fault]
    harm(here / SOURCE)
    refused(["convert", SOURCE, "-o", OUTPUT], 3, message, capsys)
    shutil.rmtree(SOURCE)
    shutil.copytree(tiny_llava_factory(shards=2), SOURCE)
    converts(undisturbed)


@pytest.mark.parametrize(
    "fault", [f for f in HEADERS | TENSORS if not f.startswith(("LoRA", "empty folder", "config of", ".bin"))]
)
def test_export_refuses_what_convert_refuses(
    here: Path, converted_factory: Callable[..., Path], capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    shutil.copytree(converted_factory("llama", "hub", 2, False, "llava"), here / "pyramid")
    harm, message = (HEADERS | TENSORS)[fault]
    harm(here / "pyramid")
    refused(["export", "--model", "pyramid", "-o", OUTPUT], 3, message, capsys)


@pytest.mark.usefixtures("here")
def test_a_missing_folder_and_a_file_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["convert", "./no where", "-o", OUTPUT], 3, "does not exist", capsys)
    refused(["convert", f"{SOURCE}/{CONFIG}", "-o", OUTPUT], 3, "is a file: expected a checkpoint folder", capsys)


# What transformers stumbles over, and need not.
HARMLESS: dict[str, Harm] = {
    "index without metadata": edit(INDEX, "metadata"),
    "buffer of an old version": both(
        set_tensor("vision_tower.vision_model.embeddings.position_ids", np.arange(145)[None], SHARD),
        place("vision_tower.vision_model.embeddings.position_ids", SHARD),
    ),
    "mixed dtypes": set_tensor(NORM, np.ones(64, np.float16)),
    "head beside a tied embedding": edit(CONFIG, "tie_word_embeddings", value=True),
    "without a head": both(
        set_tensor("language_model.lm_head.weight", None),
        place("language_model.lm_head.weight"),
        edit(CONFIG, "text_config", "tie_word_embeddings", value=True),
        edit(CONFIG, "tie_word_embeddings", value=True),
    ),
    ".bin beside": overwrite("pytorch_model.bin", b"a pickle that nobody opens"),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_what_does_no_harm_is_converted_and_loads(here: Path, case: str) -> None:
    import dpn_cli

    HARMLESS[case](here / SOURCE)
    before = listing(here / SOURCE)
    assert main(["convert", SOURCE, "-o", OUTPUT]) == 0
    assert listing(here / SOURCE) == before
    assert {path.name for path in here.iterdir()} == {SOURCE, OUTPUT, ".dpn"}
    for shard in (SHARD, OTHER_SHARD):
        assert (here / OUTPUT / shard).read_bytes() == (here / SOURCE / shard).read_bytes()
    dpn_cli.load(here / OUTPUT)  # it refuses a model with any tensor missing or too much


def test_one_file_wins_over_an_index_as_in_transformers(here: Path, tiny_llava: Path) -> None:
    shutil.copy(tiny_llava / "model.safetensors", SOURCE)
    (here / SOURCE / SHARD).write_bytes(b"")
    assert main(["convert", SOURCE, "-o", OUTPUT]) == 0
    (shard,) = (here / OUTPUT).glob("model-*.safetensors")
    assert shard.read_bytes() == (tiny_llava / "model.safetensors").read_bytes()
    assert not (here / OUTPUT / "model.safetensors").exists()


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def folder_of_the_user(path: Path) -> Path:
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    return path


OUTPUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "the input": (lambda f: f / SOURCE, "overlaps the input"),
    "inside the input": (lambda f: f / SOURCE / "x" / "y", "overlaps the input"),
    "around the input": (lambda f: f, "overlaps the input"),
    "a link to the input": (lambda f: link(f / "link", f / SOURCE), "overlaps the input"),
    "a link elsewhere": (lambda f: link(f / "link", f / "nowhere"), "was not written by dpn"),
    "a file": (lambda f: f / SOURCE / ".." / "file", "was not written by dpn"),
    "a folder of the user": (lambda f: folder_of_the_user(f / "mine"), "was not written by dpn"),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_is_not_dpns_is_never_touched(
    here: Path, undisturbed: Listing, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    make, message = OUTPUTS[output]
    (here / "file").write_text("mine")
    target = make(here)
    refused(["convert", SOURCE, "-o", str(target), "--force"], 2, message, capsys)
    assert main(["convert", SOURCE, "-o", OUTPUT]) == 0
    assert listing(Path(OUTPUT)) == undisturbed


def test_a_converted_input_is_refused(here: Path, undisturbed: Listing, capsys: pytest.CaptureFixture[str]) -> None:
    converts(undisturbed)
    capsys.readouterr()
    refused(["convert", OUTPUT, "-o", "again"], 3, "already a pyramid", capsys)
    refused(["convert", SOURCE, "-o", OUTPUT], 2, "exists: choose another --output, or pass --force", capsys)
    assert main(["convert", SOURCE, "-o", OUTPUT, "--force"]) == 0
    assert listing(here / OUTPUT) == undisturbed


@pytest.mark.usefixtures("here")
def test_a_place_that_cannot_be_written_is_named(
    undisturbed: Listing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", _read_only)
        refused(["convert", SOURCE, "-o", OUTPUT], 1, "cannot be written (Read-only file system): choose", capsys)
    converts(undisturbed)


def _read_only(path: os.PathLike[str], flags: int, *args: int, **kwargs: int) -> int:
    if not flags & os.O_CREAT:
        return _open(path, flags, *args, **kwargs)
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


@pytest.mark.usefixtures("here")
def test_a_full_disk_is_seen_before_the_first_byte(
    undisturbed: Listing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(target: Path, needed_bytes: int) -> None:
        check_space(target, needed_bytes + (1 << 60))

    with monkeypatch.context() as patch:
        patch.setattr("dpn_cli.conversion.convert.check_space", full)
        refused(["convert", SOURCE, "-o", "deep/er"], 1, "free some space or choose another --output", capsys)
    converts(undisturbed)


@pytest.mark.parametrize("limit", [100, 5_000, 500_000])
@pytest.mark.usefixtures("here")
def test_a_disk_that_fills_up_leaves_nothing_behind(
    undisturbed: Listing, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(Path())
    with largest_file(limit):
        assert main(["convert", SOURCE, "-o", OUTPUT]) == 1
    said = capsys.readouterr().err
    assert "make room and run the same command line again" in said
    assert said.startswith("Error: ") and said.count("\n") == 1
    assert listing(Path()) == before
    converts(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(
    here: Path,
    undisturbed: Listing,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    before, handlers = listing(here), {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        patch.setattr("dpn_cli.conversion.convert.write_index", lambda *_: os.kill(os.getpid(), number))
        assert main(["convert", SOURCE, "-o", OUTPUT]) == 130
    for each, handler in handlers.items():
        signal.signal(each, handler)
    progress, *rest = filter(None, capsys.readouterr().err.splitlines())
    assert progress.startswith("writing weights: ") and rest == ["Interrupted."]
    assert listing(here) == before
    converts(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["reader gone", "no stdout"])
@pytest.mark.usefixtures("here")
def test_a_closed_stdout_loses_the_table_and_nothing_else(undisturbed: Listing, closed: str) -> None:
    """An export, which begins faster, does the same in test_channels.py."""
    reader, writer = os.pipe()
    os.close(reader)
    options = {"stdout": writer} if closed == "reader gone" else {"preexec_fn": lambda: os.close(1)}
    done = subprocess.run([*DPN, "convert", SOURCE, "-o", OUTPUT], stderr=subprocess.PIPE, check=False, **options)
    os.close(writer)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    said = [line for line in done.stderr.decode().splitlines() if line.startswith("Error")]
    assert len(said) == (closed == "no stdout")
    assert all(line.startswith("Error: stdout cannot be written (Bad file descriptor)") for line in said)
    assert listing(Path(OUTPUT)) == undisturbed
    assert Path(".dpn/current.json").is_file()
