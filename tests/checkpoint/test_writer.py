import errno
import fcntl
import os
from pathlib import Path

import pytest

from dpn_cli.checkpoint.writer import copy_file, link_file, replace_file, write_named_pieces
from dpn_cli.errors import DpnError

CONTENT = bytes(range(256)) * 1000


def test_a_copy_has_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    told: list[int] = []
    copy_file(tmp_path / "a", tmp_path / "b", told.append)
    assert sum(told) == len(CONTENT)
    assert (tmp_path / "b").read_bytes() == CONTENT


def test_a_link_is_copied_as_the_file_it_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    copy_file(tmp_path / "link", tmp_path / "b")
    assert not (tmp_path / "b").is_symlink()
    assert (tmp_path / "b").read_bytes() == CONTENT


@pytest.mark.parametrize("after", [0, 1])
def test_where_the_kernel_does_not_copy_the_bytes_still_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    in_kernel, calls = os.copy_file_range, []

    def refuse_later(source: int, target: int, count: int) -> int:
        calls.append(count)
        if len(calls) > after:
            raise OSError(errno.EXDEV, "cross-device")
        return in_kernel(source, target, 1000)

    monkeypatch.setattr(os, "copy_file_range", refuse_later)
    (tmp_path / "a").write_bytes(CONTENT)
    told: list[int] = []
    copy_file(tmp_path / "a", tmp_path / "b", told.append)
    assert sum(told) == len(CONTENT)
    assert (tmp_path / "b").read_bytes() == CONTENT


def test_a_full_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    (tmp_path / "a").write_bytes(CONTENT)
    with pytest.raises(OSError, match="No space"):
        copy_file(tmp_path / "a", tmp_path / "b")


def test_a_link_is_a_second_name_of_what_a_cached_symlink_points_to(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(CONTENT)
    (tmp_path / "snapshot").symlink_to("blob")
    placement = link_file(tmp_path / "snapshot", tmp_path / "b")
    assert placement in ("cloned", "linked")
    assert not (tmp_path / "b").is_symlink() and (tmp_path / "b").read_bytes() == CONTENT
    if placement == "linked":
        assert (tmp_path / "b").samefile(tmp_path / "blob")


def test_where_nothing_can_be_linked_the_bytes_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    (tmp_path / "a").write_bytes(CONTENT)
    assert link_file(tmp_path / "a", tmp_path / "b") == "copied"
    assert (tmp_path / "b").read_bytes() == CONTENT and not (tmp_path / "b").samefile(tmp_path / "a")


def test_a_shard_takes_its_tensors_in_any_order(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tensors = {"a": ("F32", (2,)), "b": ("U8", (3,)), "c": ("U8", ())}
    pieces = [("b", b"\1"), ("c", b"\7"), ("a", bytes(4)), ("b", b"\2\3"), ("a", bytes(4))]
    write_named_pieces(tmp_path / "x.safetensors", tensors, pieces, {"format": "pt"})
    read = load_file(tmp_path / "x.safetensors")
    assert {name: value.tolist() for name, value in read.items()} == {"a": [0, 0], "b": [1, 2, 3], "c": 7}
    for wrong in (pieces[:-1], [*pieces, ("c", b"\0")]):
        with pytest.raises(DpnError, match="header promises"):
            write_named_pieces(tmp_path / f"{len(wrong)}.safetensors", tensors, wrong, {})


def test_a_file_is_replaced_and_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in ("x", f".x.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to("mine")
    replace_file(tmp_path / "x", lambda path: path.write_text("new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "new", "mine": "mine"}
