"""Reading images that may be anything: checked by their headers before a pixel is decoded."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from dpn_cli.calibration.data.faults import MISSING, RowError
from dpn_cli.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # decoders that start no other program
MAX_PIXELS = 89_478_485  # from here on Pillow warns of a decompression bomb
MAX_FILE_BYTES = 1 << 30
MAX_ASPECT_RATIO = 200  # the shorter side is scaled to the vision tower's: a thinner image grows without bounds
# What Pillow's decoders raise on damaged files: LookupError and ArithmeticError stand for indices and sizes gone wrong.
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, RuntimeError, LookupError, ArithmeticError, TypeError, struct.error,
)  # fmt: skip


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        RowError: if there is none, or it is too large to be an image.
    """
    try:
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        size = None
    if size is None:
        raise RowError(MISSING, f"no image file {printable(path)}")
    if size > MAX_FILE_BYTES:
        raise RowError("image too large", f"{printable(path)} has {size} bytes, at most {MAX_FILE_BYTES} are read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise RowError("image cannot be read", f"{printable(path)}: {error.strerror}") from None


def image_path(root: Path, value: Any) -> Path:
    """Return the file that a row names.

    Args:
        root: where relative paths start.
        value: a path, or an object with one.

    Raises:
        RowError: if it names no file.
    """
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        raise RowError("no image path", f"expected the path of an image, found {type(path).__name__}")
    if path.startswith(("http://", "https://", "data:")):
        raise RowError("image not in a file", f"{path!r:.100} is no file: only images on this disk are read")
    return root / path


def check_image(data: bytes, name: str) -> None:
    """Decode an image at the least resolution that shows it to be whole.

    Raises:
        RowError: if it is none, is too large by what its header says, too thin, or damaged.
    """
    try:
        with Image.open(BytesIO(data), formats=_formats()) as image:
            _check_size(image.size, name)
            image.draft("RGB", (1, 1))  # a JPEG is decoded at an eighth
            image.convert("RGB")
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError("image too large", f"{name}: {error}") from None
    except MemoryError:
        raise RowError("image too large", f"{name} does not fit into memory") from None
    except _UNREADABLE as error:
        raise RowError("image cannot be decoded", f"{name}: {_reason(error)}") from None


def open_image(image: Path | bytes | Image.Image) -> Image.Image:
    """Return an image in RGB.

    Raises:
        DataError: if it cannot be read.
    """
    with _opened(image) as opened:
        return opened.convert("RGB")


def image_size(image: Path | bytes | Image.Image) -> tuple[int, int]:
    """Return an image's height and width, from its header.

    Raises:
        DataError: if it cannot be read.
    """
    with _opened(image) as opened:
        return opened.height, opened.width


@contextmanager
def _opened(image: Path | bytes | Image.Image) -> Iterator[Image.Image]:
    """Open an image, and say which one it is if it cannot be read."""
    if isinstance(image, Image.Image):
        yield image
        return
    name = "an image in a table" if isinstance(image, bytes) else printable(image)
    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image, formats=_formats()) as opened:
            yield opened
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is no image that can be read ({_reason(error)})") from None


def printable(path: Path) -> str:
    """Return a path as text that any terminal takes, lone surrogates escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


@cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise RowError("image too large", f"{name} has {width}×{height} pixels, at most {MAX_PIXELS} are decoded")
    if max(size) > MAX_ASPECT_RATIO * max(1, min(size)):
        raise RowError("image too thin", f"{name} has {width}×{height} pixels, at most 1:{MAX_ASPECT_RATIO} is read")


def _reason(error: BaseException) -> str:
    """Return what Pillow says, without the address of the buffer that it read."""
    return "no known image format" if "cannot identify" in str(error) else str(error) or type(error).__name__
