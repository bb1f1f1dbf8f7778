"""Nothing that a source brings along is run, and nothing that it holds floods the terminal."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.cli import main
from dpn_cli.errors import CheckpointError
from dpn_cli.inference.loading import load_processor
from dpn_cli.parallel.launch import launch
from tests.originals import Original


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("only_foreign", [False, True])
def test_code_of_a_source_is_never_run(
    source: Path, picture: Path, capsys: pytest.CaptureFixture[str], only_foreign: bool
) -> None:
    (source / "evil.py").write_text("import os; os.mkdir('ran')\nclass Evil:\n    pass\n")
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        classes = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
        write_json(source / file, read_json(source / file) | {"auto_map": dict.fromkeys(classes, "evil.Evil")})
    if only_foreign:
        known = {"processor_class": "EvilProcessor"}
        write_json(source / "processor_config.json", read_json(source / "processor_config.json") | known)
    converted = main(["convert", str(source), "-o", "out"])
    assert not Path("ran").exists() and converted == (3 if only_foreign else 0), capsys.readouterr().err
    if only_foreign:
        return
    assert not list(Path("out").glob("*.py")) and "auto_map" not in read_json(Path("out", "config.json"))
    shutil.copy(source / "evil.py", "out")
    code = main(["run", "--model", "out", "--image", str(picture), "what colour ?", "--max-new-tokens", "1"])
    assert main(["export", "--model", "out", "-o", "exported", "--uncalibrated"]) == 0
    assert not Path("exported", "evil.py").exists()
    assert not Path("ran").exists()
    assert code == 0, capsys.readouterr().err


def test_a_processor_that_needs_foreign_code_is_refused(source: Path) -> None:
    (source / "evil.py").write_text("import os; os.mkdir('ran')\n")
    foreign = {"auto_map": {"AutoProcessor": "evil.Evil"}, "processor_class": "EvilProcessor"}
    write_json(source / "processor_config.json", read_json(source / "processor_config.json") | foreign)
    with pytest.raises(CheckpointError, match="without foreign code"):
        load_processor(source)
    assert not Path("ran").exists()


def test_a_pickle_beside_safetensors_is_not_opened(source: Path) -> None:
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(Path("opened").absolute())))
    write_json(source / "pytorch_model.bin.index.json", {"weight_map": {"x": "pytorch_model.bin"}})
    assert main(["convert", str(source), "-o", "out"]) == 0
    assert main(["export", "--model", "out", "-o", "exported", "--uncalibrated"]) == 0
    assert main(["inspect", str(source)]) == 0
    assert not [path for folder in ("out", "exported") for path in Path(folder).glob("*.bin*")]
    assert not Path("opened").exists()


def test_a_pickle_that_runs_code_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Trap(Path("opened").absolute())}))
    assert main(["convert", str(source), "-o", "out"]) == 3
    assert "could run code, so nothing was read" in capsys.readouterr().err
    assert not Path("opened").exists() and not Path("out").exists()


def test_a_vision_towers_pickle_is_not_opened_beside_safetensors(
    make_original: Callable[..., Original], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    original = make_original()
    tower = Path(shutil.copytree(original.clip, "tower"))
    save_file(torch.load(tower / "pytorch_model.bin", weights_only=True), tower / "model.safetensors")
    (tower / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(Path("opened").absolute())))
    assert main(["convert", str(original.folder), "--vision-tower", str(tower), "-o", "out"]) == 0
    assert not Path("opened").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_token_index", "x" * 10**6), ("vision_feature_select_strategy", list(range(10**5)))],
)
def test_a_huge_value_is_not_printed_whole(
    source: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))
    assert main(["convert", str(source), "-o", "out"]) == 3
    message = capsys.readouterr().err
    assert str(source) in message and len(message) < 2000


FOREIGN = {  # what makes transformers run or open other files
    "auto_map": {"AutoProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"},
    "custom_pipelines": {"evil": {"impl": "evil.Evil"}},
    "attn_implementation": "stranger/kernel",
    "vocab_file": "/etc/hostname",
}


def planted(data: Any) -> Any:
    """Return JSON with the foreign keys in every object."""
    if isinstance(data, dict):
        return {key: planted(value) for key, value in data.items()} | FOREIGN
    return [planted(each) for each in data] if isinstance(data, list) else data


def keys(data: Any) -> Iterator[str]:
    """Yield the keys of JSON, at every depth."""
    if isinstance(data, dict):
        yield from data
    for each in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from keys(each)


def test_what_runs_code_is_in_no_file_that_is_copied(source: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    (source / "evil.py").write_text("import os; os.mkdir('ran')\nclass Evil:\n    pass\n")
    images = read_json(source / "processor_config.json")["image_processor"]
    write_json(source / "preprocessor_config.json", images)
    write_json(source / "video_preprocessor_config.json", images)
    names = [path.name for path in source.glob("*.json") if path.name != "tokenizer.json"]
    for name in names:
        write_json(source / name, planted(read_json(source / name)))
    assert main(["convert", str(source), "-o", "out", "--link"]) == 0
    for name in names:
        converted = read_json(Path("out", name))
        assert not FOREIGN.keys() & set(keys(converted)), name
        pyramid = {key: converted[key] for key in converted if key == "pyramid"}
        write_json(Path("out", name), planted(converted) | pyramid)  # a stranger's folder, converted
    shutil.copy(source / "evil.py", "out")
    assert main(["export", "--model", "out", "-o", "exported", "--uncalibrated"]) == 0
    for path in Path("exported").glob("*.json"):
        found = FOREIGN.keys() & set(keys(read_json(path)))
        assert found == ({"auto_map"} if path.name == "config.json" else set()), path
    auto_map = read_json(Path("exported", "config.json"))["auto_map"]
    assert {each.partition(".")[0] for each in auto_map.values()} == {"modeling_dpn_llava"}
    assert [path.name for path in Path("exported").glob("*.py")] == ["modeling_dpn_llava.py"]
    AutoProcessor.from_pretrained("exported", trust_remote_code=True)
    AutoModelForImageTextToText.from_pretrained("exported", trust_remote_code=True)
    assert not Path("ran").exists()


def test_a_vocabulary_keeps_words_that_elsewhere_lead_to_code(source: Path) -> None:
    data = read_json(source / "tokenizer.json")
    data["model"]["vocab"] |= {"auto_map": 300, "vocab_file": 301}
    (source / "tokenizer.json").write_text(json.dumps(data))
    assert main(["convert", str(source), "-o", "out"]) == 0
    assert Path("out", "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("pairs", "found"), [(51, "nests deeper than 100"), (20_000, "is not JSON")])
def test_deep_json_is_one_sentence(source: Path, capsys: pytest.CaptureFixture[str], pairs: int, found: str) -> None:
    path = source / "generation_config.json"
    path.write_text('{"x": [' * pairs + "]}" * pairs)
    assert main(["convert", str(source), "-o", "out"]) == 3
    message = capsys.readouterr().err
    assert f"{path} {found}" in message and message.count("\n") == 1
    assert not Path("out").exists()


def test_code_is_found_as_deep_as_json_is_read(source: Path) -> None:
    deep: dict[str, Any] = {"auto_map": {}}
    for _ in range(48):
        deep = {"x": [deep]}
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"deep": deep}))
    assert main(["convert", str(source), "-o", "out"]) == 0
    assert "auto_map" not in Path("out", path.name).read_text(encoding="utf-8")


@pytest.mark.parametrize("how", ["dpn", "python -m dpn_cli"])
def test_code_of_the_current_folder_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("click", "yaml", "rich", "numpy", "torch", "json", "runpy"):
        Path(f"{module}.py").write_text("import os; os.mkdir('ran')")
    if how == "dpn":
        Path("dpn_cli").mkdir()
        shutil.copy("click.py", "dpn_cli/__init__.py")
        assert launch(["recipes"], 2) == 0
    else:
        subprocess.run([sys.executable, "-m", "dpn_cli", "recipes"], check=True, capture_output=True)
    assert not Path("ran").exists()


SIDE_FILES = ("merges.txt", "tokenizer.json", "config.json", "generation_config.json", "LICENSE", "README.md", "x.log")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user's, beside the stranger's folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "secret").write_text('{"token": "hf_secret"}')
    return tmp_path / "mine" / "secret"


def replaced_by_link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", SIDE_FILES)
@pytest.mark.parametrize("relative", [False, True])
def test_a_side_file_that_leads_out_of_the_folder_is_refused(
    source: Path, secret: Path, capsys: pytest.CaptureFixture[str], name: str, relative: bool
) -> None:
    replaced_by_link(source / name, Path("..", "mine", "secret") if relative else secret)
    assert main(["convert", str(source), "-o", "out"]) == 3
    message = capsys.readouterr().err
    assert f"{source / name} is a symbolic link out of its folder" in message and "hf_secret" not in message
    assert {path.name for path in Path().iterdir()} == {"source", "mine"}


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to("../../mine/secret")])
def test_extra_chat_templates_are_plain_files_of_the_folder(
    source: Path, secret: Path, capsys: pytest.CaptureFixture[str], plant: Callable[[Path], None]
) -> None:
    trap = source / "additional_chat_templates" / "tools.jinja"
    trap.parent.mkdir()
    plant(trap)
    assert main(["convert", str(source), "-o", "out"]) == 3
    message = capsys.readouterr().err
    assert str(trap) in message and "hf_secret" not in message


@pytest.mark.parametrize("command", ["export", "calibrate", "inspect", "run"])
def test_every_command_refuses_a_converted_folder_with_links_out_of_it(
    make_converted: Callable[..., Path], secret: Path, picture: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = make_converted()
    replaced_by_link(folder / "merges.txt", secret)
    options = {"export": ["-o", "out"], "calibrate": ["--data", "demo"], "run": ["--image", str(picture), "what ?"]}
    assert main([command, "--model", str(folder), *options.get(command, [])]) == 3
    assert "merges.txt is a symbolic link out of its folder" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "/state", "/adapter", "/.adapter.old", "/report.json"])
def test_calibration_deletes_and_writes_nothing_by_way_of_a_link(
    make_converted: Callable[..., Path], secret: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    folder, place = make_converted(calibrated=False), f"calibration{place}"
    mine = secret.parent
    for name in ("state", "adapter"):
        (mine / name).mkdir()
        (mine / name / "kept").touch()
    before = sorted(mine.rglob("*"))
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(mine)
    assert main(["calibrate", "--model", str(folder), "--data", "demo", "--samples", "16", "--restart"]) == 3
    assert f"{folder / place} is a symbolic link" in capsys.readouterr().err
    assert sorted(mine.rglob("*")) == before


@pytest.mark.parametrize("name", ["tokenizer_config.json", "merges.txt", "model.safetensors", "notes"])
def test_a_pipe_or_a_device_in_a_folder_is_refused(source: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    for make in (os.mkfifo, lambda path: replaced_by_link(Path(path), Path("/dev/zero"))):
        (source / name).unlink(missing_ok=True)
        make(source / name)
        assert main(["convert", str(source), "-o", "out"]) == 3
        assert str(source / name) in capsys.readouterr().err


def test_weights_may_be_on_another_disk(source: Path) -> None:
    Path("disk").mkdir()
    shard = Path(shutil.move(source / "model.safetensors", "disk"))
    before = shard.read_bytes()
    (source / "model.safetensors").symlink_to(shard.absolute())
    assert main(["convert", str(source), "-o", "out", "--link"]) == 0
    assert main(["export", "--model", "out", "-o", "exported", "--uncalibrated"]) == 0
    assert shard.read_bytes() == before
    assert not [path for folder in ("out", "exported") for path in Path(folder).iterdir() if path.is_symlink()]


def test_links_inside_of_the_folder_and_to_folders_are_none_of_its_files(source: Path, secret: Path) -> None:
    (source / "latest.json").symlink_to("generation_config.json")
    (source / "LICENSE").symlink_to("license.txt")
    (source / "license.txt").write_text("mine")
    (source / "data").symlink_to(secret.parent)
    assert main(["convert", str(source), "-o", "out"]) == 0
    assert Path("out", "LICENSE").read_text() == "mine"
    assert not Path("out", "LICENSE").is_symlink() and not Path("out", "data").exists()


def test_blobs_of_the_hubs_cache_are_its_own_and_nothing_behind_them(
    source: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot, blobs = Path("repo", "snapshots", "0123"), Path("repo", "blobs")
    snapshot.mkdir(parents=True)
    shutil.copytree(source, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert main(["convert", str(snapshot), "-o", "out"]) == 0
    replaced_by_link(blobs / "tokenizer.json", secret)
    assert main(["convert", str(snapshot), "-o", "again"]) == 3
    blobs.rename("elsewhere")
    blobs.symlink_to(Path("elsewhere").absolute())
    assert main(["convert", str(snapshot), "-o", "again"]) == 3
    assert "tokenizer.json is a symbolic link out" in capsys.readouterr().err


def test_what_no_model_needs_stays_behind_and_is_named(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("id_rsa", "evil.py", "notes.txt", "trainer_state.json", "LICENSE.py"):
        (source / name).write_text("{}")
    for name in ("README.md", ".env", "optimizer.pt", "logo.png"):  # nobody misses them
        (source / name).write_text("{}")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "vocab.json"):
        (source / name).write_text("{}")
    assert main(["convert", str(source), "-o", "out"]) == 0
    left = "LICENSE.py, evil.py, id_rsa, notes.txt, trainer_state.json"
    assert f"Left behind, since dpn does not know them as parts of a model: {left}.\n" in capsys.readouterr().err
    kept = {path.name for path in Path("out").iterdir()}
    assert kept >= {"LICENSE", "NOTICE.txt", "USE_POLICY.md", "chat_template.jinja", "vocab.json"}
    assert not kept & {*left.split(", "), "README.md", ".env", "optimizer.pt", "logo.png"}


def test_a_side_file_of_impossible_size_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (source / "merges.txt").open("wb") as file:
        file.truncate(1 << 40)
    assert main(["convert", str(source), "-o", "out"]) == 3
    assert "merges.txt has 1,099,511,627,776 bytes" in capsys.readouterr().err
