"""What calibration and evaluation read, whatever it came from. No torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from dpn_cli.data.images import halved, image_size, most_pixels, open_image, printable


@dataclass(frozen=True)
class StoredImage:
    """An encoded image inside a table, fetched when it is needed.

    Attributes:
        name: Name of the image in messages.
        read: returns the encoded bytes.
    """

    name: str
    read: Callable[[], bytes] = field(compare=False)


ImageSource = Path | StoredImage | Image.Image


@dataclass(frozen=True)
class Turn:
    """A question and, where the data has one, its answer.

    Attributes:
        question: the question, without image placeholders.
        answer: the answer, never empty; None if the data has none.
        images: number of the sample's images that stand before this question.
    """

    question: str
    answer: str | None = None
    images: int = 0


@dataclass(frozen=True)
class Sample:
    """One conversation, about its images if it has any.

    Attributes:
        id: the sample's name in reports.
        images: files, images in a table, or pictures in memory, in the order of the turns that show them.
        turns: the questions and answers, at least one; only the last may lack an answer. If no turn says how many
            images it shows, the first shows them all.
        kind: the group that figures are reported by, where the data has groups.
        system: the text before the conversation, or the empty string.
        row: the number of the sample's row, from 1; 0 if the data has no rows.
    """

    id: str
    images: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]
    kind: str | None = None
    system: str = ""
    row: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        """Give the images to the first turn where no turn claims any.

        Raises:
            ValueError: if the turns show more or fewer images than there are.
        """
        shown = sum(turn.images for turn in self.turns)
        if shown == 0 and self.images:
            first = replace(self.turns[0], images=len(self.images))
            object.__setattr__(self, "turns", (first, *self.turns[1:]))
        elif shown != len(self.images):
            raise ValueError(f"the turns of sample {self.id} show {shown} images, it has {len(self.images)}")

    @property
    def is_answered(self) -> bool:
        """Whether the data has an answer to every question."""
        return all(turn.answer is not None for turn in self.turns)

    @property
    def asked(self) -> int:
        """The index of the turn that a model is asked to answer: the unanswered one, else the first."""
        return next((i for i, turn in enumerate(self.turns) if turn.answer is None), 0)

    def images_until(self, turn: int) -> tuple[ImageSource, ...]:
        """Return the images that are shown up to and including one turn; all of them for the last, -1."""
        return self.images[: sum(each.images for each in self.turns[: turn + 1 or None])]

    def open_images(self, turn: int = -1) -> list[Image.Image]:
        """Return the images in RGB, upright, of the whole conversation or as far as one turn.

        Raises:
            DataError: if one cannot be read.
        """
        most = most_pixels(self._whole_sizes() if len(self.images) > 1 else [])  # one that is alone is read once
        return [open_image(*each, most) for each in self._encoded(turn)]

    def image_sizes(self, turn: int = -1) -> list[tuple[int, int]]:
        """Return the heights and widths of the images in pixels, as `open_images` shows them.

        Raises:
            DataError: if one cannot be read.
        """
        sizes = self._whole_sizes()
        most = most_pixels(sizes)
        return [halved(size, most) for size in sizes[: len(self.images_until(turn))]]

    def _whole_sizes(self) -> list[tuple[int, int]]:
        """Return the heights and widths of all images, before any halving."""
        return [image_size(*each) for each in self._encoded(-1)]

    def _encoded(self, turn: int) -> Iterator[tuple[Path | bytes | Image.Image, str]]:
        """Yield the images as far as one turn, those of a table as their bytes, each with its name."""
        for source in self.images_until(turn):
            if isinstance(source, StoredImage):
                yield source.read(), source.name
            else:
                yield source, printable(source) if isinstance(source, Path) else f"an image of sample {self.id}"

    def answered(self, answer: str) -> "Sample":
        """Return the conversation up to the turn that was asked, with this answer to it."""
        turns = (*self.turns[: self.asked], replace(self.turns[self.asked], answer=answer))
        return replace(self, images=self.images_until(self.asked), turns=turns)
