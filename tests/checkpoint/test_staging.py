import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dpn_cli.checkpoint.staging import staged_folder
from dpn_cli.errors import UsageError

OURS = '{"model_type": "dpn_llava"}'


def listing(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(target: Path, force: bool = False, source: Path | None = None, config: str = OURS) -> None:
    with staged_folder(target, force, "dpn_llava", source) as stage:
        (stage / "config.json").write_text(config)


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "ünï code"
    with staged_folder(target, False, "dpn_llava") as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "file").write_text("x")
        assert not target.exists()
    assert listing(target) == {"sub/file": "x"}
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out", False, "dpn_llava") as stage:
        (stage / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_stays_as_it_is_without_force(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target)
    before = listing(tmp_path)
    with pytest.raises(UsageError, match="--force"):
        write(target, config="{}")
    assert listing(tmp_path) == before


def test_force_replaces_only_a_folder_of_ours(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target)
    write(target, force=True, config='{"model_type": "dpn_llava", "new": 1}')
    assert listing(tmp_path) == {"out/config.json": '{"model_type": "dpn_llava", "new": 1}'}

    (target / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UsageError, match="not written by dpn"):
        write(target, force=True)
    link = tmp_path / "link"
    link.symlink_to(target)
    file = tmp_path / "file"
    file.write_text("x")
    for other in (link, file):
        with pytest.raises(UsageError, match="not written by dpn"):
            write(other, force=True)
    assert listing(target) == {"config.json": '{"model_type": "llava"}'}


def test_a_failed_replacement_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target)
    with pytest.raises(RuntimeError), staged_folder(target, True, "dpn_llava") as stage:
        (stage / "half").write_text("x")
        raise RuntimeError
    assert listing(tmp_path) == {"out/config.json": OURS}


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(UsageError, match="appeared meanwhile"), staged_folder(target, False, "dpn_llava"):
        write(target)
    assert listing(tmp_path) == {"out/config.json": OURS}


def test_an_output_that_overlaps_the_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text(OURS)
    (tmp_path / "link").symlink_to(source)
    for target in (
        source,
        source / "inside",
        tmp_path / "models",
        tmp_path / "link",
        tmp_path / "link" / "x",
    ):
        with pytest.raises(UsageError, match="overlaps"):
            write(target, force=True, source=source)
    assert listing(tmp_path / "models") == {"source/config.json": OURS}


def test_what_dead_processes_left_is_swept(tmp_path: Path, dead_pid: int) -> None:
    host = socket.gethostname()
    dead = tmp_path / f".out.stage.{host}.{dead_pid}"
    alive = tmp_path / f".out.stage.{host}.{os.getppid()}"
    elsewhere = tmp_path / f".out.stage.another-{host}.{dead_pid}"
    for path in (dead, alive, elsewhere):
        path.mkdir()
    write(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, elsewhere.name}


def test_a_target_caught_between_two_names_comes_back(tmp_path: Path, dead_pid: int) -> None:
    old = tmp_path / f".out.old.{socket.gethostname()}.{dead_pid}"
    old.mkdir()
    (old / "config.json").write_text(OURS)
    with pytest.raises(UsageError, match="--force"):
        write(tmp_path / "out", config="{}")
    assert listing(tmp_path) == {"out/config.json": OURS}
