"""What data can be: the formats that are known, and which one some data has. No torch, and no PIL until asked."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from dpn_cli.errors import DataError

if TYPE_CHECKING:
    from dpn_cli.data.rows import Reading
    from dpn_cli.data.scan import Source


@dataclass(frozen=True)
class Request:
    """Data to be opened.

    Attributes:
        data: as the user names it.
        image_root: where relative image paths start; by default the folder of the file that names them.
        reading: how rows are read.
        split: of the demo data.
        limit: samples to draw, of the demo data.
    """

    data: str
    image_root: Path | None
    reading: "Reading"
    split: str
    limit: int | None

    @property
    def path(self) -> Path:
        """The data as a path, whether it exists or not."""
        return Path(self.data).expanduser()

    @property
    def root(self) -> Path:
        """Where image paths start."""
        return self.image_root or (self.path if self.path.is_dir() else self.path.parent)


@dataclass(frozen=True)
class Format:
    """A format of data.

    Attributes:
        description: for help texts and messages.
        opener: the function that opens it, by module of this package. It takes a `Request`, and returns None for data
            of another format.
    """

    description: str
    opener: str

    def open(self, request: Request) -> "Source | None":
        """Open data, or return None if it is of another format."""
        module, _, function = self.opener.partition(".")
        source: Source | None = getattr(import_module(f"dpn_cli.data.{module}"), function)(request)
        return source


# In the order in which they are tried: a folder of images may hold anything else.
FORMATS = {
    "demo": Format("demo", "demo.open_demo"),
    "saved": Format("a folder from save_to_disk", "huggingface.open_saved"),
    "llava": Format("a LLaVA .json or .jsonl file", "llava.open_llava"),
    "table": Format("a parquet or arrow file", "huggingface.open_table"),
    "hub": Format("owner/name[:configuration[:split]] on the hub", "huggingface.open_hub"),
    "images": Format("a folder of images (asked stock prompts, answered by the model)", "folder.open_images"),
}


def describe_formats() -> str:
    """Return the descriptions of all formats."""
    *others, last = (each.description for each in FORMATS.values())
    return f"{', '.join(others)}, or {last}"


def open_source(request: Request) -> "Source":
    """Open data in the first format that it has.

    Raises:
        DataError: if it has none, or is damaged.
        MissingExtraError: if it needs the package `datasets`.
    """
    for each in FORMATS.values():
        if (source := each.open(request)) is not None:
            return source
    path = request.path
    what = f"is a {path.suffix or 'file without a suffix'}" if path.exists() else "does not exist"
    raise DataError(f"--data {request.data} {what}: expected {describe_formats()}")
