"""Images on the web: fetched once, within limits of size and time, and kept in a cache."""

import hashlib
import ipaddress
import os
import socket
import tempfile
import time
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from threading import Thread
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from dpn_cli import __version__
from dpn_cli.data.faults import RowError
from dpn_cli.data.images import check_image

MAX_BYTES = 64 << 20
TIME_LIMIT_S = 30.0  # for one image, redirects included
_SCHEMES = ("http", "https")
_CHUNK = 1 << 16
_SHOWN = 100  # characters


def fetch(url: str) -> bytes:
    """Return an image of the web, from the cache if it was fetched before.

    Raises:
        RowError: if it cannot be fetched within the limits, or is no image.
    """
    path = cache_folder() / hashlib.sha256(url.encode()).hexdigest()
    if path.is_file():
        return path.read_bytes()
    data = _within_time(url)
    check_image(data, shown(url))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)
    return data


def cache_folder() -> Path:
    """Return where fetched images are kept: under `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpn" / "images"


def shown(url: str) -> str:
    """Return a URL for messages, without what may be secret in it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("?")[0][:_SHOWN]
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:_SHOWN]


def _within_time(url: str) -> bytes:
    """Fetch in a thread of its own, which is left behind when the time is up: a server may drip, or a name not resolve.

    Raises:
        RowError: if there is nothing in time, or what is said by `_download`.
    """
    outcome: list[bytes | Exception] = []

    def run() -> None:
        try:
            outcome.append(_download(url))
        except Exception as error:  # noqa: BLE001 - raised below
            outcome.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIME_LIMIT_S)
    if not outcome:
        raise _fault(url, f"took longer than {TIME_LIMIT_S:g} s")
    if isinstance(outcome[0], bytes):
        return outcome[0]
    try:
        raise outcome[0]
    except HTTPError as error:
        raise _fault(url, f"{error.code} {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
        raise _fault(url, str(getattr(error, "reason", error)) or type(error).__name__) from None


def _download(url: str) -> bytes:
    """Return what a server sends.

    Raises:
        RowError: if it is too large or too slow.
    """
    deadline = time.monotonic() + TIME_LIMIT_S
    request = Request(url, headers={"User-Agent": f"dpn/{__version__}", "Accept": "image/*"})
    data = bytearray()
    with build_opener(_Redirects()).open(request, timeout=TIME_LIMIT_S) as response:
        while chunk := response.read1(_CHUNK):
            data += chunk
            if max(len(data), int(response.headers.get("Content-Length") or 0)) > MAX_BYTES:
                raise _fault(url, f"is larger than {MAX_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise _fault(url, f"took longer than {TIME_LIMIT_S:g} s")
    return bytes(data)


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, a few, but to no other scheme and to no address of a private network."""

    max_redirections = 5

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """Return the request that a redirect asks for."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in _SCHEMES:
            raise _fault(req.full_url, f"is redirected to {new.scheme}:, expected http or https")
        if (new.hostname, new.port) != (old.hostname, old.port) and not _is_public(new.hostname or ""):
            raise _fault(req.full_url, f"is redirected to {shown(newurl)}, an address of a private network")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_public(host: str) -> bool:
    """Tell whether all addresses of a host are of the public internet."""
    found: list[Any] = socket.getaddrinfo(host, None)
    addresses = (ipaddress.ip_address(each[4][0].partition("%")[0]) for each in found)
    return all((getattr(address, "ipv4_mapped", None) or address).is_global for address in addresses)


def _fault(url: str, what: str) -> RowError:
    return RowError("image not fetched", f"{shown(url)} {what}")
