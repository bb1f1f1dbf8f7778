"""What a demo picture shows, as plain data: a ground, things with marks on them, signs with words, and stops."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Split = Literal["train", "calibration", "heldout"]
Patch = tuple[int, int]
"""Row and column of one vision patch."""

SIZE = 128
PATCH = 8
GRID = SIZE // PATCH

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (45, 155, 60),
    "blue": (45, 85, 220),
    "yellow": (240, 220, 50),
    "purple": (145, 55, 175),
    "orange": (245, 140, 30),
    "black": (25, 25, 25),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
PATTERNS = ("plain", "striped", "checked", "dotted", "cloudy")
SIZES = ("small", "medium", "large")
_SPLIT_OF_BUCKET: tuple[Split, ...] = ("heldout", "calibration", *("train",) * 8)


@dataclass(frozen=True)
class Mark:
    """One letter or digit on a pale plate of a patch's size, on a thing or right beside it."""

    text: str
    patch: Patch


@dataclass(frozen=True)
class Thing:
    """One shape: what it is, where (pixels), and the mark it carries, if any."""

    shape: str
    colour: str
    size: str
    centre: tuple[int, int]
    radius: int
    mark: Mark | None

    @cached_property
    def patches(self) -> tuple[Patch, ...]:
        """List the patches whose middle lies within the shape's circle."""
        (x, y), r = self.centre, self.radius
        rows, columns = (range(max(0, (c - r) // PATCH), min(GRID, (c + r) // PATCH + 1)) for c in (y, x))
        half = PATCH // 2
        return tuple(
            (row, column)
            for row in rows
            for column in columns
            if (row * PATCH + half - y) ** 2 + (column * PATCH + half - x) ** 2 <= r * r
        )


@dataclass(frozen=True)
class Stop:
    """Three plates side by side: a name in the middle, and the names of the stops to its left and right on the line."""

    name: str
    left: str
    right: str
    patch: Patch
    """Of the left one of the three."""

    @property
    def patches(self) -> tuple[Patch, ...]:
        """List the three patches."""
        row, column = self.patch
        return ((row, column), (row, column + 1), (row, column + 2))


@dataclass(frozen=True)
class Sign:
    """A word on a coloured plate, each letter as many patches wide and high as ``scale`` says."""

    word: str
    colour: str
    scale: int
    patch: Patch
    """Of its upper left corner."""

    def letter(self, index: int) -> tuple[Patch, ...]:
        """List the patches of one letter."""
        row, column = self.patch
        steps = range(self.scale)
        return tuple((row + i, column + index * self.scale + j) for i in steps for j in steps)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """List the patches of the whole word."""
        return tuple(patch for index in range(len(self.word)) for patch in self.letter(index))


@dataclass(frozen=True)
class Ground:
    """The background: its colour, its pattern, and how many stray lines and dots lie on it."""

    colour: str
    pattern: str
    clutter: int


def _values(part: Any) -> Any:
    """Return the values of a part of a picture and of all that is in it, as `astuple` does without its copies."""
    if isinstance(part, tuple):
        return tuple(map(_values, part))
    names = getattr(part, "__match_args__", None)
    return part if names is None else tuple(_values(getattr(part, name)) for name in names)


@dataclass(frozen=True, eq=False)
class Content:
    """What a picture shows, whatever it is; to be compared by ``number``."""

    @cached_property
    def number(self) -> int:
        """Name the content: equal contents have equal numbers, and the number decides every pixel."""
        content = repr(_values(self)).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")

    @property
    def split(self) -> Split:
        """Say which split owns this content, so that no two splits can share a picture."""
        return _SPLIT_OF_BUCKET[self.number % len(_SPLIT_OF_BUCKET)]


@dataclass(frozen=True, eq=False)
class Scene(Content):
    """Everything a picture shows; to be compared by ``number``."""

    ground: Ground
    things: tuple[Thing, ...]
    stops: tuple[Stop, ...]
    signs: tuple[Sign, ...]
    shift: tuple[int, int]
    """Pixels down and to the right by which all plates lie off the patches that they cover most, from -3 to 4."""
