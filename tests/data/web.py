"""A web server on this machine, for tests."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

DRIP_S = 0.05  # between two bytes of /drip


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and paths that behave badly; notes what is asked for."""

    asked: list[str]
    redirects: dict[str, str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if target := self.redirects.get(self.path):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        elif self.path in ("/drip", "/endless"):
            self.send_response(200)
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b"x" if self.path == "/drip" else b"x" * 10_000)
                self.wfile.flush()
                time.sleep(DRIP_S if self.path == "/drip" else 0)
        else:
            super().do_GET()

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path, redirects: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder; yield its address, and the paths that are asked for."""
    asked: list[str] = []
    handler = type("Of", (Handler,), {"asked": asked, "redirects": redirects})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # how often it looks for its end
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
