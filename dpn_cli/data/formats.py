"""What data can be: the formats that are known, and which one some data has. No torch, and no PIL until asked."""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_cli.errors import DataError
from dpn_cli.notation import some

if TYPE_CHECKING:
    from dpn_cli.data.places import Places
    from dpn_cli.data.rows import Reading
    from dpn_cli.data.scan import Source

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


@dataclass(frozen=True)
class Request:
    """Data to be opened.

    Attributes:
        data: the data, as the user names it.
        image_root: the folder that relative image paths start in; by default that of the file that names them.
        reading: Options for reading rows.
        split: Split of the demo data to open.
        limit: Number of samples to draw, of data that are not there as a whole; None for all.
        seed: Random seed for sampling of such data.
        stream: Whether to read no more of a table than is drawn.
        allow_urls: Whether images of the web are fetched.
    """

    data: str
    image_root: Path | None
    reading: "Reading"
    split: str
    limit: int | None
    seed: int = 0
    stream: bool = False
    allow_urls: bool = False

    @property
    def path(self) -> Path:
        """The data as a path, whether it exists or not."""
        return Path(self.data).expanduser()

    @property
    def places(self) -> "Places":
        """Where images are looked for: relative paths start beside the file that names them."""
        from dpn_cli.data.places import Places

        beside = self.path if self.path.is_dir() else self.path.parent
        return Places(self.image_root or (beside if self.path.exists() else Path()), self.allow_urls)

    @cached_property
    def parsed(self) -> dict[Path, Any]:
        """What was found in the file that was last parsed, for the next format that looks into it."""
        return {}


@dataclass(frozen=True)
class Format:
    """A format of data.

    Attributes:
        description: Description for help texts and messages.
        opener: the function that opens it, as `module.function` of this package. It takes a `Request`, and returns None
            for data of another format.
    """

    description: str
    opener: str

    def open(self, request: Request) -> "Source | None":
        """Open data, or return None if it is of another format."""
        module, _, function = self.opener.partition(".")
        source: Source | None = getattr(import_module(f"dpn_cli.data.{module}"), function)(request)
        return source


# In the order in which they are tried: of a folder, files of rows go before the images themselves.
FORMATS = {
    "demo": Format("demo", "demo.open_demo"),
    "saved": Format("a folder from save_to_disk", "huggingface.open_saved"),
    "vqa": Format("a folder with VQAv2's questions and annotations", "vqa.open_vqa"),
    "llava": Format("a .json or .jsonl file of rows, like LLaVA's", "llava.open_llava"),
    "table": Format("a parquet or arrow file", "huggingface.open_table"),
    "csv": Format("a .csv or .tsv file", "csvfile.open_csv"),
    "webdataset": Format("a WebDataset .tar file or a folder of them", "webdataset.open_tars"),
    "coco": Format("a .json file with images and annotations, like COCO's captions", "coco.open_coco"),
    "hub": Format("owner/name[:configuration[:split]] on the hub", "huggingface.open_hub"),
    "images": Format("a folder of images (asked stock prompts, answered by the model)", "folder.open_images"),
}


def only_file(request: Request, suffixes: Collection[str], holds_rows: Callable[[Path], bool]) -> Path | None:
    """Return the data's file of rows: the data itself, or the one in its folder; None if there is none.

    Raises:
        DataError: if there are several in the folder.
    """
    path = request.path
    if not path.is_dir():
        return path if path.is_file() and path.suffix.lower() in suffixes else None
    files = sorted(each for each in path.iterdir() if each.suffix.lower() in suffixes and holds_rows(each))
    if len(files) > 1:
        names = some([each.name for each in files])
        raise DataError(f"{path} holds several data files ({names}): give one of them as --data")
    return files[0] if files else None


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and below, in the order of their paths; what links lead to is listed once."""
    files: list[Path] = []
    seen: set[str] = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [Path(path, name) for name in names]
    return sorted(files)


def describe_formats() -> str:
    """Return the descriptions of all formats."""
    *others, last = (each.description for each in FORMATS.values())
    return f"{'; '.join(others)}; or {last}"


def open_source(request: Request) -> "Source":
    """Open data in the first format that it has.

    Raises:
        DataError: if it has none, or is damaged.
        MissingExtraError: if it needs the package `datasets`.
    """
    path = request.path
    for each in map(Path, _entries(path)):
        if not (each.is_file() or each.is_dir()) and each.exists():
            raise DataError(f"{each} is neither a file nor a folder: remove it from the data")
    for form in FORMATS.values():
        if (source := form.open(request)) is not None:
            return source
    kind = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
    kind = kind if path.is_file() or path.is_dir() else "a pipe or a device"
    what = f"is {kind}" if path.exists() else "does not exist"
    raise DataError(f"--data {request.data} {what}: expected {describe_formats()}")


def _entries(path: Path, depth: int = 2) -> Iterator[os.DirEntry[str]]:
    """Yield what a folder holds, and those in it."""
    if depth and path.is_dir():
        for entry in os.scandir(path):
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry), depth - 1)
