"""A folder of images without text: every image gets one of the stock prompts, the model its own answer."""

from collections.abc import Sequence
from pathlib import Path

from dpn_cli.data.formats import Request
from dpn_cli.data.images import SUFFIXES
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.errors import DataError


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder and below, without hidden ones."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


class ImageFolder:
    """The images of a folder, in the order of their names."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        """List the files.

        Raises:
            DataError: if there are none.
        """
        self.name = str(folder)
        self.folder = folder
        self.files = image_files(folder)
        self.prompts = prompts
        self.format = f"folder of images ({len(prompts)} stock prompts in turn)"
        if not self.files:
            raise DataError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def number(self, index: int) -> int:
        """Return the place of a file in the order of names, from 1."""
        return index + 1

    def fields(self) -> list[str]:
        """Return no fields to group by: there are images alone."""
        return []

    def sample(self, index: int) -> Sample:
        """Return one image with its prompt."""
        path = self.files[index]
        turn = Turn(self.prompts[index % len(self.prompts)], images=1)
        return Sample(str(path.relative_to(self.folder)), (path,), (turn,))


def open_images(request: Request) -> ImageFolder | None:
    """Open a folder, whatever else it holds."""
    return ImageFolder(request.path, request.reading.prompts) if request.path.is_dir() else None
