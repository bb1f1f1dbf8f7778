"""Reading images that may be anything: checked by their headers before a pixel is decoded.

Every reader goes through `_opened`, so that one limit holds for all, and every picture is upright, as viewers show it.
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from dpn_cli.checkpoint.headers import LFS_SIGNATURE
from dpn_cli.data.faults import MISSING, RowError
from dpn_cli.limits import (
    MAX_ASPECT_RATIO,
    MAX_DECODER_BYTES,
    MAX_IMAGE_BYTES,
    MAX_PIXELS,
    MAX_WHOLE_PIXELS,
    MIN_HALVED_PIXELS,
)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # decoders that start no other program
_BYTES_PER_PIXEL = {"WEBP": 20, "AVIF": 20, "TIFF": 8}  # of decoders that take more than the decoded pixels
_PROGRESSIVE = 8  # of a JPEG whose coefficients are kept
_UNSCALED = ("I", "F")  # Pillow's modes whose values may lie anywhere
_BAND = 64  # rows of a reduced image
_STANDS = "TIFF"  # Pillow gives it the size of the upright image
_QUARTER_TURNS = (5, 6, 7, 8)  # values of EXIF's orientation
Size = tuple[int, int]
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


def open_image(image: Path | bytes | Image.Image, name: str, most: float = MAX_WHOLE_PIXELS) -> Image.Image:
    """Return an image in RGB, upright, its sides halved until it has few enough pixels.

    A picture in memory that is so already is returned itself, not a copy.

    Args:
        image: a file, its content, or a picture in memory.
        name: Name of the image in messages.
        most: Number of pixels it may have, see `most_pixels`.

    Raises:
        RowError: as `check_image`.
    """
    with _opened(image, name) as opened:
        width, height = opened.size
        factor = _factor(opened.size, most)
        if factor > 1 and opened is not image:  # what of it the decoder of a JPEG can do
            opened.draft("RGB", (max(1, width // factor), max(1, height // factor)))
        return _upright(opened, factor // round(max(width / opened.width, height / opened.height)))


def image_size(image: Path | bytes | Image.Image, name: str) -> Size:
    """Return the height and width of an upright image, before any halving, from its header alone.

    Args:
        image: a file, its content, or a picture in memory.
        name: Name of the image in messages.

    Raises:
        RowError: as `check_image`.
    """
    with _opened(image, name) as opened:
        width, height = opened.size
        lies = opened.format != _STANDS and _orientation(opened) in _QUARTER_TURNS
        return (width, height) if lies else (height, width)


def halved(size: Size, most: float) -> Size:
    """Return what `open_image` makes of a size."""
    return _divided(size, _factor(size, most))


def most_pixels(sizes: Iterable[Size]) -> float:
    """Return how many pixels each of the images may have that are in memory together.

    While all have more than `MAX_WHOLE_PIXELS`, the sides of the largest are halved, unless it has fewer than
    `MIN_HALVED_PIXELS`. Images of one size stay of one size.

    Args:
        sizes: Heights and widths of the images; none for an image that is alone.
    """
    areas: list[float] = [math.prod(size) for size in sizes]
    while sum(areas) > MAX_WHOLE_PIXELS and (largest := max(areas)) >= MIN_HALVED_PIXELS:
        areas = [area / 4 if area == largest else area for area in areas]
    return max(areas, default=MAX_WHOLE_PIXELS)


def size_fault(width: int, height: int) -> RowError | None:
    """Return why an image of this size is not read, if so."""
    if width * height > MAX_PIXELS:
        return RowError("image too large", f"{width}×{height} pixels, at most {MAX_PIXELS} are decoded")
    if max(width, height) > MAX_ASPECT_RATIO * max(1, min(width, height)):
        return RowError("image too thin", f"{width}×{height} pixels, at most 1:{MAX_ASPECT_RATIO} is read")
    return None


def _decoder_fault(image: Image.Image) -> RowError | None:
    """Return why the decoder of an image takes too much memory, if so."""
    progressive = image.info.get("progressive", 0)
    each = _PROGRESSIVE if progressive else _BYTES_PER_PIXEL.get(image.format or "", 1)
    if math.prod(image.size) <= (most := MAX_DECODER_BYTES // each):
        return None
    kind = f"{'progressive ' if progressive else ''}{image.format}"
    return RowError("image too large", f"{image.width}×{image.height} pixels, at most {most} are decoded of a {kind}")


def printable(path: Path) -> str:
    """Return a path as text that any terminal takes, lone surrogates escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


@contextmanager
def _opened(image: Path | bytes | Image.Image, name: str) -> Iterator[Image.Image]:
    """Open an image and check its size; turn what its decoder raises into a fault of the row."""
    try:
        with _source(image) as opened:
            if fault := size_fault(*opened.size) or _decoder_fault(opened):
                raise RowError(fault.reason, f"{name} has {fault.detail}")
            if opened.mode in _UNSCALED:
                raise RowError("32-bit image", f"{name} has 32 bits per pixel, of unknown range: expected 8 or 16")
            yield opened
    except RowError:
        raise
    except Image.DecompressionBombError:
        raise RowError("image too large", f"{name} has more than the {MAX_PIXELS} pixels that are decoded") from None
    except MemoryError:
        raise RowError("image too large", f"{name} does not fit into memory") from None
    except _UNREADABLE as error:
        reason = _known_reason(image) or _reason(error)
        raise RowError("image cannot be decoded", f"{name}: {reason}") from None


def _upright(image: Image.Image, factor: int = 1) -> Image.Image:
    """Return an image in RGB and upright, its sides divided by a factor; copied only where it is not so already."""
    image.load()  # some formats have their EXIF after the pixels
    orientation = _orientation(image)
    if factor > 1:
        image = _reduced(image, factor)
    if orientation:
        image.getexif()[ExifTags.Base.Orientation] = orientation
        image = ImageOps.exif_transpose(image)
    return _rgb(image)


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """Return the means of squares of pixels in RGB; band by band, since of the whole image a copy takes too much."""
    reduced = Image.new("RGB", _divided(image.size, factor))
    for top in range(0, reduced.height, _BAND):
        box = (0, top * factor, image.width, min((top + _BAND) * factor, image.height))
        reduced.paste(_rgb(image.crop(box)).reduce(factor), (0, top))
    return reduced


def _rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB; of 16-bit grey, Pillow would make white."""
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value * (1 / 257))
    return image if image.mode == "RGB" else image.convert("RGB")


def _factor(size: Size, most: float) -> int:
    """Return the power of two by which the sides of an image are divided; see `open_image`."""
    factor = 1
    while math.prod(size) > most * factor**2:
        factor *= 2
    return factor


def _divided(size: Size, factor: int) -> Size:
    return -(-size[0] // factor), -(-size[1] // factor)


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
        raise RowError("a folder in place of an image" if _is(path, Path.is_dir) else MISSING, printable(path))
    if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
        raise RowError("image too large", f"{printable(path)} has {size} bytes, at most {MAX_IMAGE_BYTES} are read")
    return path


def is_file(path: Path) -> bool:
    """Tell whether a path leads to a file."""
    return _is(path, Path.is_file)


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError):  # a name that no file can have
        return False


@cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _known_reason(image: Path | bytes | Image.Image) -> str:
    """Say what stands in the place of an image, where that is easily told."""
    if isinstance(image, Path):
        with image.open("rb") as file:
            image = file.read(len(LFS_SIGNATURE))
    if not isinstance(image, bytes):
        return ""
    if image.startswith(LFS_SIGNATURE):
        return "a Git LFS pointer, run `git lfs pull`"
    return "" if image else "an empty file"


def _reason(error: BaseException) -> str:
    """Return what Pillow says, without the address of the buffer that it read."""
    return "not a known image format" if "cannot identify" in str(error) else str(error) or type(error).__name__
