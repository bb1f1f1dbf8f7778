"""Nothing that a source brings along is run, and nothing that it holds floods the terminal."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.cli import main
from dpn_cli.errors import CheckpointError
from dpn_cli.modeling.loading import load_processor
from tests.originals import Original


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def source(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a good checkpoint in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_llava, "source"))


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
    assert main(["convert", str(source), "-o", "out"]) == 0
    assert not list(Path("out").glob("*.py")) and "auto_map" not in read_json(Path("out", "config.json"))
    shutil.copy(source / "evil.py", "out")
    code = main(["run", "--model", "out", "--image", str(picture), "what colour ?", "--max-new-tokens", "1"])
    assert main(["export", "--model", "out", "-o", "exported", "--uncalibrated"]) == 0
    assert not Path("exported", "evil.py").exists()
    assert not Path("ran").exists()
    assert code == (3 if only_foreign else 0), capsys.readouterr().err


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
    assert "could run code: nothing of it was read" in capsys.readouterr().err
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
