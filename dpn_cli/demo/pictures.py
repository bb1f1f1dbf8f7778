"""The demo pictures and their questions: seeded, endless, in splits that share no picture.

A picture holds one to four large shapes, each in a quadrant of its own and each with a small mark on
pale plates of one vision patch: a letter, two digits one above the other, or two digits side by side.
Coarse questions ask for what covers many patches, fine questions for what covers one.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dpn_cli.demo.glyphs import DIGITS, LETTERS, bitmap

Split = Literal["train", "calibration", "heldout"]
Grain = Literal["coarse", "fine"]
MarkKind = Literal["letter", "stack", "pair"]

SIZE = 96
PATCH = 8
GRID = SIZE // PATCH
QUADRANT = GRID // 2

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
SHAPES = ("circle", "square", "triangle", "star", "cross")
NUMBERS = ("one", "two", "three", "four")
MARK_KINDS: tuple[MarkKind, ...] = ("letter", "stack", "pair")

GRAINS: dict[str, Grain] = {
    "background": "coarse",
    "count": "coarse",
    "colour": "coarse",
    "shape": "coarse",
    "letter": "fine",
    "stack": "fine",
    "pair": "fine",
}
KINDS = tuple(GRAINS)

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "background": ("What colour is the background?", "Which colour is behind the shapes?"),
    "count": ("How many large shapes are there?", "How many shapes are in the picture?"),
    "colour": ("What colour is the {}?", "Which colour does the {} have?"),
    "shape": ("Which shape is {}?", "What shape is the {} thing?"),
    "letter": ("Which letter is in the {}?", "What is the letter in the {}?"),
    "upper": ("Which digit is at the top in the {}?", "What is the upper digit in the {}?"),
    "lower": ("Which digit is at the bottom in the {}?", "What is the lower digit in the {}?"),
    "left": ("Which digit is on the left in the {}?", "What is the left digit in the {}?"),
    "right": ("Which digit is on the right in the {}?", "What is the right digit in the {}?"),
}
_PLACES: dict[MarkKind, tuple[str, ...]] = {
    "letter": ("letter",),
    "stack": ("upper", "lower"),
    "pair": ("left", "right"),
}
_SPLIT_OF_BUCKET: tuple[Split, ...] = ("heldout", "calibration", *("train",) * 8)


@dataclass(frozen=True)
class Mark:
    """The small mark of a shape: its kind, its characters and the patch (row, column) of each."""

    kind: MarkKind
    characters: str
    patches: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Thing:
    """One large shape: what it is, where (pixels) and which mark it carries."""

    shape: str
    colour: str
    centre: tuple[int, int]
    radius: int
    mark: Mark


@dataclass(frozen=True)
class Turn:
    """One question about a picture and its answer, a single word."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows."""

    background: str
    things: tuple[Thing, ...]

    @cached_property
    def digest(self) -> str:
        """Name the content: equal scenes have equal digests."""
        return hashlib.sha256(repr((self.background, self.things)).encode()).hexdigest()[:16]

    @property
    def split(self) -> Split:
        """Say which split owns this content, so that no two splits can share a picture."""
        return _SPLIT_OF_BUCKET[int(self.digest, 16) % len(_SPLIT_OF_BUCKET)]

    def turns(self, rng: np.random.Generator) -> list[Turn]:
        """List every question that this picture answers, each in a wording drawn by ``rng``."""

        def turn(kind: str, wording: str, name: str, answer: str) -> Turn:
            choices = _QUESTIONS[wording]
            return Turn(kind, choices[rng.integers(len(choices))].format(name), answer)

        turns = [
            turn("background", "background", "", self.background),
            turn("count", "count", "", NUMBERS[len(self.things) - 1]),
        ]
        for thing in self.things:
            turns.append(turn("colour", "colour", thing.shape, thing.colour))
            turns.append(turn("shape", "shape", thing.colour, thing.shape))
            places = _PLACES[thing.mark.kind]
            for place, character in zip(places, thing.mark.characters, strict=True):
                turns.append(turn(thing.mark.kind, place, thing.shape, character))
        return turns

    def draw(self) -> Image.Image:
        """Draw the picture: RGB, ``SIZE`` pixels square, the same pixels every time."""
        rng = np.random.default_rng(int(self.digest, 16))
        image = Image.new("RGB", (SIZE, SIZE), _shade(self.background, rng))
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            _draw_shape(pen, thing, _shade(thing.colour, rng))
        pixels = np.asarray(image, dtype=np.int16)
        pixels = pixels + rng.integers(-6, 7, size=pixels.shape, dtype=np.int16)
        for thing in self.things:
            tint = np.array(COLOURS[thing.colour]) // 2 + 125
            for character, (row, column) in zip(thing.mark.characters, thing.mark.patches, strict=True):
                _stamp(pixels[row * PATCH :, column * PATCH :], character, tint, rng)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Sample:
    """A picture with one question, for calibration and evaluation."""

    id: str
    image: Image.Image
    question: str
    answer: str
    kind: str
    grain: Grain


def scenes(split: Split, seed: int = 0) -> Iterator[Scene]:
    """Yield scenes of a split without end.

    Args:
        split: Which of the disjoint splits to draw from.
        seed: Names the stream; equal arguments give equal scenes in any process.
    """
    key = hashlib.sha256(f"{split}/{seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(key[:8], "little"))
    while True:
        scene = _scene(rng)
        if scene.split == split:
            yield scene


def samples(split: Split, count: int, seed: int = 0) -> Iterator[Sample]:
    """Yield one-question samples, the kinds of question in turn.

    Args:
        split: Which of the disjoint splits to draw from.
        count: How many samples.
        seed: Names the stream; equal arguments give equal samples in any process.
    """
    stream = scenes(split, seed)
    rng = np.random.default_rng(seed)
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        choices: list[Turn] = []
        while not choices:
            scene = next(stream)
            choices = [turn for turn in scene.turns(rng) if turn.kind == kind]
        turn = choices[rng.integers(len(choices))]
        yield Sample(f"{split}-{seed}-{index}", scene.draw(), turn.question, turn.answer, kind, GRAINS[kind])


def corpus() -> list[str]:
    """List every question and answer there is, for the tokenizer."""
    names = (*SHAPES, *COLOURS)
    questions = [wording.format(name) for group in _QUESTIONS.values() for wording in group for name in names]
    return questions + [f" {answer}" for answer in answers()]


def answers() -> tuple[str, ...]:
    """List every word that answers some question."""
    return (*COLOURS, *NUMBERS, *SHAPES, *LETTERS, *DIGITS)


def _scene(rng: np.random.Generator) -> Scene:
    number = int(rng.integers(1, len(NUMBERS) + 1))
    colours = rng.choice(list(COLOURS), size=number + 1, replace=False)
    shapes = rng.choice(SHAPES, size=number, replace=False)
    quadrants = rng.choice(4, size=number, replace=False)
    things = tuple(
        _thing(str(shape), str(colour), divmod(int(quadrant), 2), rng)
        for shape, colour, quadrant in zip(shapes, colours[1:], quadrants, strict=True)
    )
    return Scene(str(colours[0]), things)


def _thing(shape: str, colour: str, quadrant: tuple[int, int], rng: np.random.Generator) -> Thing:
    top, left = quadrant[0] * QUADRANT, quadrant[1] * QUADRANT
    middle = QUADRANT * PATCH // 2
    jitter = rng.integers(-2, 3, size=2)
    centre = (left * PATCH + middle + int(jitter[0]), top * PATCH + middle + int(jitter[1]))
    return Thing(shape, colour, centre, int(rng.integers(18, 22)), _mark(top, left, rng))


def _mark(top: int, left: int, rng: np.random.Generator) -> Mark:
    kind = MARK_KINDS[rng.integers(len(MARK_KINDS))]
    row, column = top + 2 + int(rng.integers(2)), left + 2 + int(rng.integers(2))
    if kind == "letter":
        return Mark(kind, LETTERS[rng.integers(len(LETTERS))], ((row, column),))
    characters = "".join(rng.choice(list(DIGITS), size=2, replace=False))
    if kind == "stack":
        return Mark(kind, characters, ((top + 2, column), (top + 3, column)))
    return Mark(kind, characters, ((row, left + 2), (row, left + 3)))


def _shade(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = np.array(COLOURS[colour]) + rng.integers(-12, 13, size=3)
    return int(red), int(green), int(blue)


def _draw_shape(pen: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, int, int]) -> None:
    (x, y), r = thing.centre, thing.radius
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        side = r * 9 // 10
        pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif thing.shape == "cross":
        arm = r // 2
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
    else:
        pen.polygon(_outline(thing), fill=fill)


def _outline(thing: Thing) -> list[tuple[float, float]]:
    (x, y), r = thing.centre, thing.radius
    if thing.shape == "triangle":
        return [(x, y - r - 2), (x - r - 2, y + r - 2), (x + r + 2, y + r - 2)]
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    lengths = np.where(np.arange(10) % 2 == 0, r + 2, 0.45 * r)
    return [(x + length * np.cos(a), y + length * np.sin(a)) for a, length in zip(angles, lengths, strict=True)]


def _stamp(pixels: NDArray[np.int16], character: str, tint: NDArray[np.int_], rng: np.random.Generator) -> None:
    glyph = bitmap(character)
    height, width = glyph.shape
    row, column = rng.integers(PATCH - height + 1), rng.integers(PATCH - width + 1)
    plate = np.full((PATCH, PATCH, 3), tint, dtype=np.int16)
    plate[row : row + height, column : column + width][glyph] = 10
    pixels[:PATCH, :PATCH] = plate + rng.integers(-5, 6, size=(PATCH, PATCH, 3))
