"""A folder of images without text: every image gets one of the stock prompts, the model its own answer."""

from collections.abc import Sequence
from pathlib import Path

from dpn_cli.data.formats import IMAGE_SUFFIXES, Request, files_below
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.errors import DataError

_NO_DATA = {"readme", "license", "licence", "notice", "thumbs", "desktop"}  # what a folder has besides


class ImageFolder:
    """The images of a folder, in the order of their names."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        """List the files.

        Raises:
            DataError: if there are no images, or other files beside them, which may say something about them.
        """
        self.name = str(folder)
        self.folder = folder
        files = [path for path in files_below(folder) if not _is_hidden(path, folder)]
        self.files = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        self.prompts = prompts
        self.format = f"folder of images ({len(prompts)} stock prompts in turn)"
        if not self.files:
            raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        others = [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES and _may_be_data(path, folder)]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise DataError(
                f"{folder} holds {others[0].relative_to(folder)}{more} beside its images: from a folder of images, "
                "nothing else is read. To ask every image a stock prompt, move the other files elsewhere; to have text "
                "read, give a JSON, parquet or CSV file with one row per image"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def columns(self) -> dict[str, str]:
        """Return no columns."""
        return {}

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


def _may_be_data(path: Path, folder: Path) -> bool:
    """Tell whether a file may say something about images: no README, and no part of a model in a folder below."""
    below = path.parents[: len(path.relative_to(folder).parts) - 1]
    return path.stem.lower() not in _NO_DATA and not any((parent / "config.json").is_file() for parent in below)


def _is_hidden(path: Path, folder: Path) -> bool:
    """Tell whether a path is hidden, or a preview that a network drive keeps beside pictures."""
    return any(part.startswith((".", "@")) for part in path.relative_to(folder).parts)


def open_images(request: Request) -> ImageFolder | None:
    """Open a folder."""
    return ImageFolder(request.path, request.reading.prompts) if request.path.is_dir() else None
