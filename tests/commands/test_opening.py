"""How often a command reads the config.json of the checkpoint that it is about: once, and it passes on what it read."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dpn_cli.cli import main
from tests.originals import Original


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Count how often dpn reads the config.json of every folder."""
    counts: Counter[Path] = Counter()
    read_bytes = Path.read_bytes

    def counting(path: Path) -> bytes:
        counts[path.resolve()] += 1
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counting)
    return counts


def test_convert_reads_its_source_once(tiny_llava: Path, tmp_path: Path, reads: Counter[Path]) -> None:
    assert main(["convert", str(tiny_llava), "-o", str(tmp_path / "out"), "--verify"]) == 0
    assert reads[tiny_llava / "config.json"] == 1


def test_convert_reads_the_original_layout_once(
    originals: Callable[..., Original], tmp_path: Path, reads: Counter[Path]
) -> None:
    original = originals()
    line = ["convert", str(original.folder), "-o", str(tmp_path / "out"), "--vision-tower", str(original.clip)]
    assert main(line) == 0
    assert reads[original.folder / "config.json"] == 1
    assert reads[original.clip / "config.json"] == 1


@pytest.mark.parametrize(
    "line",
    [
        "export --uncalibrated --verify -o out",
        "inspect",
        "run --image picture.png what",
        "eval --data data.json --against fixed",
    ],
)
def test_a_command_reads_its_checkpoint_once(
    line: str,
    make_converted: Callable[..., Path],
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    reads: Counter[Path],
) -> None:
    folder = make_converted()
    monkeypatch.chdir(picture.parent)
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]
    Path("data.json").write_text(json.dumps([{"id": "1", "image": picture.name, "conversations": turns}]))
    reads.clear()
    assert main([*line.split(), "--model", str(folder)]) == 0
    assert reads[folder.resolve() / "config.json"] == 1
