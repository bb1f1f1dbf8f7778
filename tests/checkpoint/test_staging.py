import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpn_cli.checkpoint.staging import staged_folder
from dpn_cli.errors import DpnError, UsageError

OURS = '{"model_type": "dpn_llava"}'


def listing(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(target: Path, force: bool = False, source: Path | None = None, config: str = OURS) -> None:
    with staged_folder(target, force, "dpn_llava", source) as stage:
        (stage / "config.json").write_text(config)


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
    with pytest.raises(UsageError, match="has appeared in the meantime"), staged_folder(target, False, "dpn_llava"):
        target.mkdir()
        (target / "file").write_text("another program's")
    assert listing(tmp_path) == {"out/file": "another program's"}


@pytest.mark.parametrize("force", [False, True])
def test_a_second_run_is_refused_while_the_first_writes(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "out"
    with staged_folder(target, False, "dpn_llava") as stage:
        (stage / "config.json").write_text(OURS)
        for same in (target, tmp_path / "x" / ".." / "out"):
            with pytest.raises(UsageError, match="is being written by another run"):
                write(same, force, config="{}")
        write(tmp_path / "other")
    assert listing(tmp_path) == {"other/config.json": OURS, "out/config.json": OURS}


def test_a_lock_that_ends_while_it_is_asked_for_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    lock = tmp_path / ".out.dpn" / "lock"

    def lost_race(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        lock.unlink()  # the first run ends: the file that was opened is no longer the one at this path
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lost_race)
    with staged_folder(tmp_path / "out", False, "dpn_llava") as stage:
        (stage / "config.json").write_text(OURS)
        with pytest.raises(UsageError, match="is being written by another run"):
            write(tmp_path / "out")
    assert listing(tmp_path) == {"out/config.json": OURS}


def test_where_there_are_no_locks_the_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "out")
    assert listing(tmp_path) == {"out/config.json": OURS}


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    script = (
        "import os, signal; from pathlib import Path; from dpn_cli.checkpoint.staging import staged_folder\n"
        "with staged_folder(Path('out'), False, 'dpn_llava') as stage:\n"
        "    (stage / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.dpn"]
    write(tmp_path / "out")
    assert listing(tmp_path) == {"out/config.json": OURS}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_caught_between_two_names_comes_back(tmp_path: Path) -> None:
    old = tmp_path / ".out.dpn" / "old"
    old.mkdir(parents=True)
    (old.parent / "lock").touch()
    (old / "config.json").write_text(OURS)
    with pytest.raises(UsageError, match="--force"):
        write(tmp_path / "out", config="{}")
    assert listing(tmp_path) == {"out/config.json": OURS}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: Any, *_: Any) -> int:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DpnError, match=f"cannot be written.*{os.strerror(code)}.*choose another --output"):
        write(tmp_path / "out")


def test_the_working_directory_is_replaced_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    write(Path(), force=True, config=OURS + " ")
    assert listing(tmp_path) == {"out/config.json": OURS + " "}


def test_a_loop_of_links_and_a_name_that_is_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "source").mkdir()
    for target, complaint in (("loop", "exists"), ("loop/out", "cannot be written"), ("o\udcff", "is not UTF-8")):
        with pytest.raises(DpnError, match=complaint):
            write(tmp_path / target, source=tmp_path / "source")
    assert {path.name for path in tmp_path.iterdir()} == {"loop", "source"}


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


@pytest.mark.parametrize("role", ["stage", "old"])
def test_a_link_in_the_place_of_a_folder_of_ours_is_not_followed(tmp_path: Path, role: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text(OURS)
    for target in (mine, tmp_path / "nowhere"):
        (tmp_path / ".out.dpn").mkdir()
        (tmp_path / ".out.dpn" / "lock").touch()
        (tmp_path / ".out.dpn" / role).symlink_to(target)
        write(tmp_path / "out", force=True)
        assert listing(tmp_path) == {"out/config.json": OURS, "mine/config.json": OURS}
        assert {path.name for path in tmp_path.iterdir()} == {"out", "mine"}


def test_a_link_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".out.dpn").symlink_to(tmp_path / "mine")
    with pytest.raises(DpnError, match="symbolic link, through which dpn does not write"):
        write(tmp_path / "out", force=True)
    assert not (tmp_path / "mine").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [".out.dpn", ".out.dpn/config.json", ".out.dpn/stage/config.json", ".out.dpn/lock"])
def test_what_has_the_name_of_a_workplace_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(
        DpnError, match=r"\.out\.dpn was not made by dpn, but has the name of one of dpn's folders: move it"
    ):
        write(tmp_path / "out")
    assert listing(tmp_path) == {name: "mine"}


def test_what_has_other_names_is_left_alone(tmp_path: Path) -> None:
    """Those of an earlier version, too, which nobody could tell from a user's own."""
    names = [".out.old/config.json", ".out.stage/config.json", ".out.lock"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(OURS)
    write(tmp_path / "out")
    assert listing(tmp_path) == dict.fromkeys([*names, "out/config.json"], OURS)
