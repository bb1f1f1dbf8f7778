"""What a poster shows, as plain data, and its composition: words, emblems with a letter, letters in the corners."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from dpn_cli.demo.pictures import stream
from dpn_cli.demo.scene import Content, Patch, Split

PATCH, GRID = 10, 10
SIZE = PATCH * GRID
LETTERS = "ACEHKLMORSTX"
INKS: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 35),
    "green": (20, 125, 45),
    "blue": (35, 65, 205),
    "purple": (135, 40, 165),
    "orange": (225, 115, 10),
    "black": (20, 20, 20),
}
PAPERS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 240),
    "pink": (250, 205, 215),
    "yellow": (250, 240, 165),
    "grey": (200, 200, 200),
}
FORMS = ("disc", "square", "triangle", "star")
FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
CORNERS: dict[str, Patch] = {
    "top left": (0, 0),
    "top right": (0, GRID - 1),
    "bottom left": (GRID - 1, 0),
    "bottom right": (GRID - 1, GRID - 1),
}
_EMBLEM = 3


@dataclass(frozen=True)
class Emblem:
    """A drawn form of three by three patches with a pale letter in its middle."""

    form: str
    ink: str
    letter: str
    patch: Patch
    """Of its upper left corner."""

    @property
    def middle(self) -> Patch:
        """The patch with the letter."""
        return self.patch[0] + 1, self.patch[1] + 1

    @property
    def patches(self) -> tuple[Patch, ...]:
        """All its patches."""
        row, column = self.patch
        return tuple((row + i, column + j) for i in range(_EMBLEM) for j in range(_EMBLEM))


@dataclass(frozen=True)
class Word:
    """Letters in one ink, a patch each, from left to right."""

    letters: str
    ink: str
    patch: Patch

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches of its letters."""
        return tuple((self.patch[0], self.patch[1] + i) for i in range(len(self.letters)))


@dataclass(frozen=True, eq=False)
class Poster(Content):
    """Everything a poster shows; equal ones have equal numbers."""

    paper: str
    noisy: bool
    font: str
    corners: str
    """A letter each, in the order of ``CORNERS``, or none."""
    emblems: tuple[Emblem, ...]
    words: tuple[Word, ...]


def posters(split: Split, seed: int) -> Iterator[Poster]:
    """Yield posters of a split without end; the splits share none.

    Args:
        split: Which of the splits to draw from.
        seed: Names the stream; equal arguments give equal posters.
    """
    rng = stream(split, seed)
    while True:
        poster = compose(rng)
        if poster.split == split:
            yield poster


def compose(rng: Random) -> Poster:
    """Draw one poster at random; half of them show one thing alone, on which a teacher learns to look."""
    alone = rng.choice(("emblem", "word", "corners")) if rng.random() < 0.5 else None
    free = {(row, column) for row in range(GRID) for column in range(GRID)} - set(CORNERS.values())
    num_emblems = {None: rng.randint(1, 4), "emblem": 1}.get(alone, 0)
    emblems = tuple(
        Emblem(rng.choice(FORMS), rng.choice(tuple(INKS)), rng.choice(LETTERS), patch)
        for patch in (_place(rng, free, _EMBLEM, _EMBLEM) for _ in range(num_emblems))
        if patch
    )
    count = {None: rng.randint(1, 3), "word": 1}.get(alone, 0)
    words = []
    for first, ink in zip(rng.sample(LETTERS, count), rng.sample(tuple(INKS), count), strict=True):
        length = rng.randint(3, 4)
        patch = _place(rng, free, 1, length)
        if patch:
            rest = rng.sample([letter for letter in LETTERS if letter != first], length - 1)
            words.append(Word(first + "".join(rest), ink, patch))
    corners = "".join(rng.choices(LETTERS, k=len(CORNERS))) if alone in (None, "corners") else ""
    return Poster(rng.choice(tuple(PAPERS)), rng.random() < 0.5, rng.choice(FONTS), corners, emblems, tuple(words))


def _place(rng: Random, free: set[Patch], height: int, width: int) -> Patch | None:
    """Take a free rectangle, if chance finds one soon."""
    for _ in range(12):
        row, column = rng.randint(0, GRID - height), rng.randint(0, GRID - width)
        wanted = {(row + i, column + j) for i in range(height) for j in range(width)}
        if wanted <= free:
            free -= wanted
            return row, column
    return None
