import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpn_cli import workspace
from dpn_cli.cli import main
from dpn_cli.errors import UsageError


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_last_one_remembered_is_current(tmp_path: Path) -> None:
    for name in ("first", "sécond model"):
        (tmp_path / name).mkdir()
        workspace.remember(Path(name))
    assert workspace.current(None) == (tmp_path / "sécond model").resolve()
    assert [path.name for path in (tmp_path / ".dpn").iterdir()] == ["current.json"]


def test_two_that_remember_at_once_wait_for_each_other(tmp_path: Path) -> None:
    names = [str(i) for i in range(32)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: workspace.remember(Path(name)), names))
    remembered = json.loads((tmp_path / ".dpn" / "current.json").read_text())["checkpoint"]
    assert Path(remembered).name in names
    assert [path.name for path in (tmp_path / ".dpn").iterdir()] == ["current.json"]


def test_an_explicit_model_wins(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    workspace.remember(Path("first"))
    assert workspace.current(Path("other")) == Path("other")


def test_without_one_the_error_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run `dpn convert MODEL` first"):
        workspace.current(None)
    (tmp_path / "gone").mkdir()
    workspace.remember(Path("gone"))
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="is gone"):
        workspace.current(None)
    (tmp_path / ".dpn" / "current.json").write_text("[]")
    with pytest.raises(UsageError, match="is damaged"):
        workspace.current(None)


@pytest.mark.parametrize("place", [".dpn", ".dpn/current.json", ".dpn/evaluation", ".dpn/evaluation/0123"])
def test_a_state_that_leads_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "mine").mkdir()
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match=f"{place} is a symbolic link"):
        workspace.current(None)
    assert main(["convert", "demo", "--dry-run"]) == 2
    assert list((tmp_path / "mine").iterdir()) == []
