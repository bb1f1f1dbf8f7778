"""The demo's pictures, drawn as they are needed."""

from functools import cached_property, partial
from io import BytesIO
from threading import Lock
from typing import TYPE_CHECKING, cast

from dpn_cli.data.formats import Request
from dpn_cli.data.rows import KIND_FIELD
from dpn_cli.data.samples import Sample, StoredImage, Turn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpn_cli.demo.pictures import Sample as Picture
    from dpn_cli.demo.pictures import Split

DEMO_SAMPLES = 512


class DemoPictures:
    """The first samples of one of the demo's streams."""

    name = "demo"

    def __init__(self, split: "Split", count: int) -> None:
        """Take note of which pictures; each is composed when it, or a later one, is first asked for."""
        self.format = f"demo pictures ({split})"
        self.split: Split = split
        self.count = count
        self._composed: list[Sample] = []
        self._composing = Lock()

    @cached_property
    def _stream(self) -> "Iterator[Picture]":
        from dpn_cli.demo.pictures import samples

        return samples(self.split, self.count)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.count

    def columns(self) -> dict[str, str]:
        """Return no columns."""
        return {}

    def number(self, index: int) -> int:
        """Return the place in the stream, from 1."""
        return index + 1

    def fields(self) -> list[str]:
        """Return the field to group by."""
        return [KIND_FIELD]

    def sample(self, index: int) -> Sample:
        """Return one sample."""
        with self._composing:
            while len(self._composed) <= index:
                self._composed.append(_asked(next(self._stream)))
        return self._composed[index]


def _asked(picture: "Picture") -> Sample:
    image = StoredImage(f"the picture of {picture.id}", partial(_encoded, picture))
    return Sample(picture.id, (image,), (Turn(picture.question, picture.answer, images=1),), picture.kind)


def _encoded(picture: "Picture") -> bytes:
    """Draw a picture, in the format that is made fastest."""
    file = BytesIO()
    picture.image.save(file, "BMP")
    return file.getvalue()


def open_demo(request: Request) -> DemoPictures | None:
    """Open the demo's pictures, if they are what is asked for."""
    if request.data != "demo":
        return None
    return DemoPictures(cast("Split", request.split), DEMO_SAMPLES if request.limit is None else request.limit)
