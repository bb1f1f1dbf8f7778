"""Reading images that may be anything: checked by their headers before a pixel is decoded.

Every reader goes through `_opened`, so that one limit holds for all, and every picture is upright, as viewers show it.
"""

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from dpn_cli.data.faults import MISSING, RowError
from dpn_cli.limits import MAX_ASPECT_RATIO, MAX_IMAGE_BYTES, MAX_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # decoders that start no other program
_UNSCALED = ("I", "F")  # Pillow's modes whose values may lie anywhere
_QUARTER_TURNS = (5, 6, 7, 8)  # values of EXIF's orientation
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
        return _validate_file(path).read_bytes()
    except OSError as error:
        raise RowError("image cannot be read", f"{printable(path)}: {error.strerror}") from None


def check_image(data: bytes, name: str) -> None:
    """Decode an image at the least resolution that shows it to be whole.

    Raises:
        RowError: if it is none, is too large by what its header says, too thin, or damaged.
    """
    with _opened(data, name) as image:
        image.draft("RGB", (1, 1))  # a JPEG is decoded at an eighth
        _upright(image)


def open_image(image: Path | bytes | Image.Image, name: str) -> Image.Image:
    """Return an image in RGB, upright; a picture in memory that is so already is returned itself, not a copy.

    Args:
        image: a file, its content, or a picture in memory.
        name: what messages call the image.

    Raises:
        RowError: as `check_image`.
    """
    with _opened(image, name) as opened:
        return _upright(opened)


def image_size(image: Path | bytes | Image.Image, name: str) -> tuple[int, int]:
    """Return the height and width of an image that stands upright, from its header if it is stored so.

    Args:
        image: a file, its content, or a picture in memory.
        name: what messages call the image.

    Raises:
        RowError: as `check_image`.
    """
    with _opened(image, name) as opened:
        lies = _orientation(opened) in _QUARTER_TURNS
        upright = ImageOps.exif_transpose(opened) if lies else opened
        return upright.height, upright.width


def size_fault(width: int, height: int) -> RowError | None:
    """Return why an image of this size is not read, if so."""
    if width * height > MAX_PIXELS:
        return RowError("image too large", f"{width}×{height} pixels, at most {MAX_PIXELS} are decoded")
    if max(width, height) > MAX_ASPECT_RATIO * max(1, min(width, height)):
        return RowError("image too thin", f"{width}×{height} pixels, at most 1:{MAX_ASPECT_RATIO} is read")
    return None


def printable(path: Path) -> str:
    """Return a path as text that any terminal takes, lone surrogates escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


@contextmanager
def _opened(image: Path | bytes | Image.Image, name: str) -> Iterator[Image.Image]:
    """Open an image and check its size; turn what its decoder raises into a fault of the row."""
    try:
        with _source(image) as opened:
            if fault := size_fault(*opened.size):
                raise RowError(fault.reason, f"{name} has {fault.detail}")
            if opened.mode in _UNSCALED:
                raise RowError("32-bit image", f"{name} has 32 bits per pixel, of unknown range: expected 8 or 16")
            yield opened
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError("image too large", f"{name}: {error}") from None
    except MemoryError:
        raise RowError("image too large", f"{name} does not fit into memory") from None
    except _UNREADABLE as error:
        raise RowError("image cannot be decoded", f"{name}: {_reason(error)}") from None


def _upright(image: Image.Image) -> Image.Image:
    """Return an image in RGB and upright, copied only where it is not; of 16-bit grey, Pillow would make white."""
    image.load()  # some formats have their EXIF after the pixels
    upright = ImageOps.exif_transpose(image) if _orientation(image) else image
    if upright.mode.startswith("I;16"):
        upright = upright.convert("I").point(lambda value: value * (1 / 257))
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    return image.getexif().get(ExifTags.Base.Orientation)


def _source(image: Path | bytes | Image.Image) -> AbstractContextManager[Image.Image]:
    """Open what is encoded; leave a picture in memory open."""
    if isinstance(image, Image.Image):
        return nullcontext(image)
    return Image.open(BytesIO(image) if isinstance(image, bytes) else _validate_file(image), formats=_formats())


def _validate_file(path: Path) -> Path:
    """Return a path that leads to a file which is not too large to be an image."""
    if not is_file(path):
        raise RowError(MISSING, printable(path))
    if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
        raise RowError("image too large", f"{printable(path)} has {size} bytes, at most {MAX_IMAGE_BYTES} are read")
    return path


def is_file(path: Path) -> bool:
    """Tell whether a path leads to a file."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


@cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reason(error: BaseException) -> str:
    """Return what Pillow says, without the address of the buffer that it read."""
    return "not a known image format" if "cannot identify" in str(error) else str(error) or type(error).__name__
