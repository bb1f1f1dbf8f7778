"""Uploading an export, against a hub that is not there."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import RepoUrl
from huggingface_hub.errors import HfHubHTTPError

from dpn_cli.cli import main

TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What a stub of the hub is asked for; a user is logged in."""
    made: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> RepoUrl:
            made.append(("create", {"repo_id": repo_id, **options}))
            return RepoUrl(f"https://huggingface.co/me/{repo_id.rsplit('/', maxsplit=1)[-1]}")

        def upload_folder(self, **options: Any) -> None:
            files = {path.name for path in Path(options["folder_path"]).iterdir()}
            made.append(("upload", options | {"files": files}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return made


@pytest.fixture
def here(make_converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_converted()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_finished_folder_is_uploaded(
    here: Path, calls: list[tuple[str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--model", "tiny-dpn", "-o", "out", "--push", "me/tiny", "--private", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["url"] == "https://huggingface.co/me/tiny"
    assert [name for name, _ in calls] == ["create", "upload"]
    assert calls[0][1] == {"repo_id": "me/tiny", "private": True, "exist_ok": True}
    assert calls[1][1]["repo_id"] == "me/tiny"
    assert {"config.json", "model.safetensors", "README.md", "modeling_dpn_llava.py"} <= calls[1][1]["files"]
    assert TOKEN not in captured.err + captured.out


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (["--push", "not a repo"], 2, "not a repository id"),
        (["--private"], 2, "give --push too"),
        (["--push", "me/tiny", "--static", "9,9,9,9,9"], 2, "'9' is not an expert of site 0"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    here: Path,
    calls: list[tuple[str, dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    complaint: str,
) -> None:
    assert main(["export", "--model", "tiny-dpn", "-o", "out", *options]) == code
    assert complaint in capsys.readouterr().err
    assert not calls and not Path("out").exists()


def test_without_a_token_or_the_hub_nothing_is_begun(
    here: Path,
    calls: list[tuple[str, dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["export", "--model", "tiny-dpn", "-o", "out", "--push", "me/tiny"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(arguments) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(arguments) == 1
    assert "hf auth login" in capsys.readouterr().err
    assert not calls and not Path("out").exists()


def let_uploads_fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fail)


def refused(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status}: " + "long words of the server " * 20, response=response)


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (refused(403), r"HTTP 403 (a token that may write there is needed)"),
        (refused(500), "HTTP 500;"),
        (ConnectionError("no route to host"), "cannot be reached (ConnectionError)"),
        (OSError(errno.ENOSPC, "No space left on device"), "not uploaded: No space left on device;"),
        (ValueError("odd"), "the upload failed (ValueError);"),
    ],
)
def test_a_failed_upload_leaves_the_export_and_says_how_to_go_on(
    here: Path,
    calls: list[tuple[str, dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    complaint: str,
) -> None:
    let_uploads_fail(monkeypatch, error)
    assert main(["export", "--model", "tiny-dpn", "-o", "out", "--push", "me/tiny"]) == 1
    progress, message = capsys.readouterr().err.splitlines()
    assert progress.startswith("writing weights: ")
    assert complaint in message and "hf upload me/tiny out" in message
    assert len(message) < 300 and TOKEN not in message
    assert Path("out", "config.json").is_file()


@pytest.mark.parametrize(("error", "code"), [(ConnectionError(), 1), (KeyboardInterrupt(), 130)])
def test_what_uploads_the_folder_later_makes_a_private_repository_too(
    here: Path,
    calls: list[tuple[str, dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    let_uploads_fail(monkeypatch, error)
    assert main(["export", "--model", "tiny-dpn", "-o", "my out", "--push", "me/tiny", "--private"]) == code
    said = capsys.readouterr().err
    assert "is complete, but not uploaded" in said and "hf upload me/tiny 'my out' --private\n" in said
