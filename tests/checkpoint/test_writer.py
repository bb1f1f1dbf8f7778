import errno
import os
from pathlib import Path

import pytest

from dpn_cli.checkpoint.writer import copy_file

CONTENT = bytes(range(256)) * 1000


def test_a_copy_has_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    assert copy_file(tmp_path / "a", tmp_path / "b") == len(CONTENT)
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
    assert copy_file(tmp_path / "a", tmp_path / "b") == len(CONTENT)
    assert (tmp_path / "b").read_bytes() == CONTENT


def test_a_full_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    (tmp_path / "a").write_bytes(CONTENT)
    with pytest.raises(OSError, match="No space"):
        copy_file(tmp_path / "a", tmp_path / "b")
