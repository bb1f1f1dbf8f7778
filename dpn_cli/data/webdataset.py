"""WebDataset archives: the files of a tar that share a name up to its first dot make one sample.

Source: https://github.com/webdataset/webdataset
"""

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dpn_cli.data.faults import RowError
from dpn_cli.data.fields import ROLES
from dpn_cli.data.formats import IMAGE_SUFFIXES, Request, files_below
from dpn_cli.data.places import Places
from dpn_cli.data.rows import Reading
from dpn_cli.data.rowsource import RowSource
from dpn_cli.data.samples import StoredImage
from dpn_cli.errors import DataError
from dpn_cli.limits import MAX_IMAGE_BYTES
from dpn_cli.notation import counted

KEY = "__key__"  # the name of a sample, as `datasets` calls it too
ARCHIVE = ".tar"
_IMAGE = ROLES["image"][0]  # goes before what the JSON may say of the image
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_TEXTS = {"txt", "text", "caption"}
_MAPS = {"seg", "segmentation", "mask", "depth", "label", "labels", "normal", "normals"}  # as in `0001.seg.png`
_FIELDS = {name for role, names in ROLES.items() if role != "image" for name in names} - _TEXTS


@dataclass(frozen=True)
class _Part:
    """One file of a sample: where its bytes are in an archive."""

    archive: Path
    name: str
    start: int
    size: int

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            RowError: if there are too many, or the archive has changed.
        """
        name = f"{self.name} in {self.archive.name}"
        if self.size > MAX_IMAGE_BYTES:
            raise RowError("image too large", f"{name} has {self.size} bytes, at most {MAX_IMAGE_BYTES} are read")
        with self.archive.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) < self.size:
            raise RowError("an archive that has changed", f"{name} is cut off")
        return data


class TarSamples(RowSource):
    """The samples of some archives, in their order; only what is asked for is read."""

    def __init__(self, name: str, archives: Sequence[Path], places: Places, reading: Reading) -> None:
        """Find where the files of all samples are.

        Raises:
            DataError: if an archive is damaged or compressed, or has two files of a name, or there are no samples.
        """
        found: dict[tuple[Path, str], dict[str, _Part]] = {}
        for archive in archives:
            for key, extension, part in _parts(archive):
                if found.setdefault((archive, key), {}).setdefault(extension, part) is not part:
                    raise DataError(f"{archive} holds two files of the name {part.name}: pack each sample once")
        if not found:
            raise DataError(f"{name} holds no samples, which are files such as 0001.jpg and 0001.json")
        self.samples = [(key, parts) for (_, key), parts in found.items()]
        super().__init__(name, f"WebDataset of {counted(len(archives), 'archive')}", places, reading)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def row(self, index: int) -> dict[str, Any]:
        """Return a sample as a row, its images unread."""
        key, parts = self.samples[index]
        if missing := self._kinds - {_kind(extension) for extension in parts}:
            there = ", ".join(part.name for part in parts.values())
            raise RowError(
                "a sample that lacks a file", f"{key} has {there}, but no {' and no '.join(sorted(missing))}"
            )
        return row_of({KEY: key} | {extension: _value(extension, part) for extension, part in parts.items()})

    @cached_property
    def _kinds(self) -> set[str]:
        """The kinds of files of the first sample, which all must have."""
        return {_kind(extension) for extension in self.samples[0][1]}


def row_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the files of a sample, by their extensions, as one row.

    The fields of its JSON stand beside the image, a text is the caption or goes by the name before its extension
    (`0001.question.txt`), and what is not known goes by its extension.

    Raises:
        RowError: if its JSON is no object, or two files say different things of the same field.
    """
    row: dict[str, Any] = {"id": parts[KEY]}
    said: dict[str, Any] = {}  # by texts and JSON
    images = []
    for extension, value in parts.items():
        kind = _kind(extension)
        before = extension.rpartition(".")[0]
        if kind == "image" and before.lower() in _MAPS:
            row[extension] = extension.encode()  # an image that is not shown
        elif kind == "image":
            images.append(value)
        elif kind in ("json", "text"):
            stated = _object(value) if kind == "json" else {before or "caption": value}
            for field, text in stated.items():
                if said.get(field, text) != text:
                    raise RowError(
                        "two texts of a kind",
                        f"{parts[KEY]} has several files for its {field}: names of samples end at their first dot",
                    )
            said |= stated
        elif not extension.startswith("__"):
            row[extension] = value
    return row | said | ({_IMAGE: images} if images else {})


def _kind(extension: str) -> str:
    last = extension.rpartition(".")[2].lower()
    return "image" if f".{last}" in IMAGE_SUFFIXES else "text" if last in _TEXTS else last


def _value(extension: str, part: _Part) -> Any:
    """Return the text of a text, an image to be read later, and of other files nothing but that they are there."""
    kind = _kind(extension)
    if kind == "image":
        return StoredImage(f"{part.name} in {part.archive.name}", part.read)
    if kind not in ("json", "text", "cls", *_FIELDS):
        return part.name.encode()
    try:
        return part.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("broken text", f"{part.name} in {part.archive.name} is not UTF-8: {error}") from None


def _object(value: Any) -> dict[str, Any]:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RowError("not JSON", str(error)) from None
    if not isinstance(value, dict):
        raise RowError("not an object", f"expected an object in the JSON of a sample, found {type(value).__name__}")
    return value


def _parts(archive: Path) -> Iterator[tuple[str, str, _Part]]:
    """Yield key, extension and place of every file in an archive, hidden ones apart."""
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                match = _NAME.fullmatch(member.name)
                if member.isdir() or match is None:
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"{archive} holds {member.name}, which is a link or not a regular file: expected files"
                    )
                yield match[1], match[2], _Part(archive, member.name, member.offset_data, member.size)
            _validate_end(archive, tar.offset)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{archive} is damaged, or not an uncompressed tar: {error}") from None


def _validate_end(archive: Path, end: int) -> None:
    """Check that an archive ends where its files do: `tarfile` takes a damaged header for the end.

    Raises:
        DataError: if something follows that is not the header of a file.
    """
    with archive.open("rb") as file:
        file.seek(end)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise DataError(f"{archive} is damaged at byte {end}, where a file should begin: pack or download it again")


def open_tars(request: Request) -> TarSamples | None:
    """Open an archive, or a folder of them."""
    path = request.path
    files = files_below(path) if path.is_dir() else [path]
    archives = [file for file in files if file.suffix.lower() == ARCHIVE and file.is_file()]
    return TarSamples(request.data, archives, request.places, request.reading) if archives else None
