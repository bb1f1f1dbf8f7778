"""The demo's pictures, drawn as they are needed."""

from functools import cached_property, partial
from io import BytesIO
from typing import TYPE_CHECKING, cast

from dpn_cli.data.formats import Request
from dpn_cli.data.rows import KIND_FIELD
from dpn_cli.data.samples import Sample, StoredImage, Turn

if TYPE_CHECKING:
    from dpn_cli.demo.pictures import Sample as Picture
    from dpn_cli.demo.pictures import Split

DEMO_SAMPLES = 512


class DemoPictures:
    """The first samples of one of the demo's streams."""

    name = "demo"

    def __init__(self, split: "Split", count: int) -> None:
        """Take note of which pictures; they are composed when the first sample is asked for."""
        self.format = f"demo pictures ({split})"
        self.split: Split = split
        self.count = count

    @cached_property
    def samples(self) -> list[Sample]:
        """Compose the pictures."""
        from dpn_cli.demo.pictures import samples

        return [
            Sample(
                each.id,
                (StoredImage(f"the picture of {each.id}", partial(_encoded, each)),),
                (Turn(each.question, each.answer, images=1),),
                each.kind,
            )
            for each in samples(self.split, self.count)
        ]

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
        return self.samples[index]


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
