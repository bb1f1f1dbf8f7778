"""A page in a real browser, driven over WebDriver; tests that need one are skipped where there is no Chromium."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
START_S = 60


class Browser:
    """One session of a WebDriver server."""

    def __init__(self, server: str, profile: Path) -> None:
        self.server = server
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.session = self._call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def open(self, page: Path, width: int, height: int, dark: bool = False) -> None:
        """Show a page at a size of the window, in light or dark colours."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._call("/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        """Return what a script returns in the page."""
        return self._call("/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        """Return what the console has shown since the last call."""
        return [each["message"] for each in self._call("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the last call."""
        events = [json.loads(each["message"])["message"] for each in self._call("/se/log", {"type": "performance"})]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]

    def close(self) -> None:
        self._call("", method="DELETE")

    def _command(self, name: str, parameters: dict[str, Any]) -> Any:
        return self._call("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def _call(self, path: str, data: dict[str, Any] | None = None, method: str = "POST") -> Any:
        session = f"/{self.session}" if hasattr(self, "session") else ""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(f"{self.server}/session{session}{path}", body, method=method)
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            return json.load(answer)["value"]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Yield a browser with a new profile; skip the test where there is none."""
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        server = f"http://127.0.0.1:{port}"
        _wait(server)
        browser = Browser(server, profile)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait()


def _wait(server: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{server}/status", timeout=START_S).close()
        except URLError:
            assert time.monotonic() < deadline, "chromedriver does not start"
            time.sleep(0.05)
        else:
            return
