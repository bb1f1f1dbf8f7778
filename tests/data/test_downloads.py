"""Images on the web, from a server on this machine: off by default, kept, and limited in every way."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_cli.cli import main
from dpn_cli.data import downloads
from dpn_cli.data.downloads import _is_public, cache_folder, shown
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import DataError
from tests.data.web import serving

REDIRECTS = {
    "/moved.png": "/a.png",
    "/loop": "/loop",
    "/elsewhere": "http://localhost:1/a.png",
    "/metadata": "http://169.254.169.254/latest",
    "/mapped": "http://[::ffff:10.0.0.1]/a.png",
    "/file": "file:///etc/passwd",
    "/ftp": "ftp://127.0.0.1/a.png",
}


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()
    Image.effect_noise((90, 90), 99).save(tmp_path / "site" / "a.png")
    (tmp_path / "site" / "page.html").write_text("<html></html>")
    with serving(tmp_path / "site", REDIRECTS) as served:
        yield served


def load(tmp_path: Path, *urls: str, **options: Any) -> Any:
    (tmp_path / "rows.json").write_text(json.dumps([{"image": url, "question": "what ?"} for url in urls]))
    return load_data(DataOptions(str(tmp_path / "rows.json"), **options))


def test_images_are_fetched_once_and_only_with_the_option(tmp_path: Path, web: tuple[str, list[str]]) -> None:
    address, asked = web
    with pytest.raises(DataError, match=r"row 1: image on the web .http://.*/a\.png is only fetched with --allow-urls"):
        load(tmp_path, f"{address}/a.png")
    assert asked == []
    data = load(tmp_path, f"{address}/moved.png", allow_urls=True)
    assert asked == ["/moved.png", "/a.png"]
    assert data.samples[0].open_images()[0].size == (90, 90)
    assert load(tmp_path, f"{address}/moved.png", allow_urls=True).digest == data.digest
    assert len(asked) == 2 and len(list(cache_folder().iterdir())) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none.png", "404 File not found"),
        ("/page.html", r"image cannot be decoded .*/page\.html: not a known image format"),
        ("/loop", "redirect error that would lead to an infinite loop"),
        ("/elsewhere", r"/elsewhere is redirected to http://localhost:1/a\.png, an address of a private network"),
        ("/metadata", r"is redirected to http://169\.254\.169\.254/latest, an address of a private"),
        ("/mapped", "an address of a private network"),
        ("/file", "302 Found - Redirection to url 'file:///etc/passwd' is not allowed"),
        ("/ftp", "is redirected to ftp:, expected http or https"),
    ],
)
def test_what_is_not_fetched_is_named_and_not_kept(
    tmp_path: Path, web: tuple[str, list[str]], path: str, message: str
) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        load(tmp_path, f"{web[0]}{path}", allow_urls=True)
    assert not cache_folder().exists()


def test_sizes_and_times_are_limited(
    tmp_path: Path, web: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_BYTES", 1000)
    for path in ("/a.png", "/endless"):  # a length that is said, and one that is not
        with pytest.raises(DataError, match=f"{path} is larger than"):
            load(tmp_path, f"{web[0]}{path}", allow_urls=True)
    monkeypatch.setattr(downloads, "TIME_LIMIT_S", 0.2)
    with pytest.raises(DataError, match=r"/drip took longer than 0\.2 s"):
        load(tmp_path, f"{web[0]}/drip", allow_urls=True)


@pytest.mark.parametrize("url", ["http://", "http://a b/x", "http://127.0.0.1:1/a.png", "http://x:y/", "http://[/a"])
def test_addresses_that_lead_nowhere_are_bad_rows(tmp_path: Path, web: tuple[str, list[str]], url: str) -> None:
    with pytest.raises(DataError, match="row 1: image not fetched"):
        load(tmp_path, url, allow_urls=True)


def test_no_secret_is_shown() -> None:
    assert shown("https://me:key@example.org/a.png?signature=1#x") == "https://example.org/a.png"


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.1.1", "::1", "fe80::1", "localhost"])
def test_private_addresses(host: str) -> None:
    assert not _is_public(host)


def test_public_addresses() -> None:
    assert _is_public("8.8.8.8") and _is_public("2001:4860:4860::8888")


def test_the_option_reaches_every_command_that_reads_data(
    tmp_path: Path, web: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps([{"image": f"{web[0]}/a.png", "question": "what ?"}]))
    assert main(["data", "rows.json"]) == 4
    assert "--allow-urls" in capsys.readouterr().err
    assert main(["data", "rows.json", "--allow-urls"]) == 0
    assert "/a.png, 90×90 pixels" in capsys.readouterr().out
