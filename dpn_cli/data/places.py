"""Where an image may sit: in a file, encoded in the row itself, or on the web (see docs/data-layouts.md)."""

import base64
import binascii
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from dpn_cli.data.downloads import fetch, shown
from dpn_cli.data.faults import RowError
from dpn_cli.data.formats import IMAGE_SUFFIXES
from dpn_cli.data.images import is_file
from dpn_cli.data.naming import folders_of, names_of
from dpn_cli.data.samples import ImageSource, StoredImage

HOLDERS = ("bytes", "base64", "data", "path", "image", "image_url", "url", "source")
"""The keys under which an object holds an image, the first one with something in it being read."""

_DIGITS = re.compile(r"(\d{1,18})(?:\.0)?")  # a number, as tables write it that hold missing ones too
_FILE_URI = re.compile(r"file:(//(localhost(?=/))?)?", re.IGNORECASE)
_DATA_URI = re.compile(r"data:([^,]*),", re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_BASE64 = re.compile(
    r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3]|SUkq|TU0A|AAAA)[A-Za-z0-9+/\s]{32,}={0,2}\s*"
)  # of images
_SHOWN = 100  # characters


@dataclass(frozen=True)
class Places:
    """Where the images of some rows are looked for.

    Attributes:
        root: Folder that relative paths start in.
        allow_urls: Whether images of the web are fetched.
    """

    root: Path = Path()
    allow_urls: bool = False

    def find(self, value: Any, name: str, again: Callable[[], Any], *, split: str = "", row: str = "") -> ImageSource:
        """Return the image that a row's value stands for, still encoded.

        Args:
            value: A path with slashes or backslashes, a number that names a file, a file:, data: or http(s) URI,
                base64 text, encoded bytes, an object with one of them under one of `HOLDERS`, or an image that is found
                already.
            name: Name for messages of an image that has no path.
            again: Function that returns the same value again, so that samples do not hold on to encoded images.
            split: Split of the row, which may be the name of a folder.
            row: Id of the row, which may be the name of a folder too.

        Raises:
            RowError: if it stands for none.
        """
        if isinstance(value, StoredImage):
            return value
        held = _held(value)
        if isinstance(held, bytes) or (isinstance(held, str) and _is_encoded(held)):
            return StoredImage(name, lambda: _decode(_held(again()), name))
        folders = [*folders_of(split, row), "images"]
        if isinstance(held, int | float) and not isinstance(held, bool) and held == held // 1:
            return self._file(names_of(int(held), split), folders)
        if isinstance(held, str) and (digits := _DIGITS.fullmatch(held)):
            return self._file([held, *names_of(int(digits[1]), split)], folders)
        if not isinstance(held, str) or not held:
            keys = f" with {', '.join(map(repr, value))}" if isinstance(value, dict) and value else ""
            expected = f"expected the path of an image, or an object with one as {', '.join(HOLDERS)}"
            raise RowError("no image path", f"{expected}; found {type(value).__name__}{keys}")
        if _WEB.match(held):
            if not self.allow_urls:
                raise RowError("image on the web", f"{shown(held)} is only fetched with --allow-urls")
            return StoredImage(shown(held), lambda: fetch(held))
        if _ELSEWHERE.match(held) and not _FILE_URI.match(held):
            raise RowError("image not in a file", f"{held!r:.{_SHOWN}} is not a file: expected a path or a file:// URI")
        path = unquote(_FILE_URI.sub("", held)) if _FILE_URI.match(held) else held
        return self._file(
            [path if "\\" not in path or is_file(self.root / path) else path.replace("\\", "/")], folders[:-1]
        )

    def _file(self, names: Iterable[str], folders: Sequence[str]) -> Path:
        """Return the first file that is there by one of its names, in one of its folders; else where it should be."""
        files = [self.root / folder / name for name in names for folder in folders]
        return next(filter(is_file, chain.from_iterable(map(_spellings, files))), files[0])


def _spellings(file: Path) -> Iterator[Path]:
    """Yield the paths that an image may have: rows leave out the end of its name, and accents are stored in two ways.

    Letters with accents are stored whole or in parts; systems differ, and archives keep what was stored.
    """
    for name in dict.fromkeys([str(file), *(unicodedata.normalize(form, str(file)) for form in ("NFC", "NFD"))]):
        spelled = Path(name)
        yield spelled
        if spelled.name and spelled.suffix.lower() not in IMAGE_SUFFIXES:
            yield from (spelled.with_name(f"{spelled.name}{suffix}") for suffix in sorted(IMAGE_SUFFIXES))


def holder(value: dict[str, Any]) -> str | None:
    """Return the key under which an object holds an image, if there is one."""
    return next((key for key in HOLDERS if value.get(key)), None)


def _is_encoded(text: str) -> bool:
    return _DATA_URI.match(text) is not None or _BASE64.fullmatch(text) is not None


def _decode(held: bytes | str, name: str) -> bytes:
    """Return the bytes of an image that a row holds itself.

    Raises:
        RowError: if they are not what they are said to be.
    """
    if isinstance(held, bytes):
        return held
    uri = _DATA_URI.match(held)
    text = held[uri.end() :] if uri else held
    if uri and not uri[1].lower().endswith(";base64"):
        return unquote_to_bytes(text)
    try:
        return base64.b64decode("".join(unquote(text).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError("image cannot be decoded", f"{name} is not base64: {error}") from None


def _held(value: Any) -> Any:
    """Return what an object holds for an image, at any depth, as `{"image_url": {"url": …}}` does."""
    while isinstance(value, dict):
        key = holder(value)
        value = None if key is None else value[key]
        if key in ("base64", "data") and isinstance(value, str) and not _DATA_URI.match(value):
            return f"data:;base64,{value}"
    return value
