"""The demo pictures and their questions: seeded, endless, in splits that share no picture.

A picture shows up to a dozen overlapping shapes of three sizes, some with a letter or a digit, signs with words in two
sizes, and the stops of a small railway, on patterned, cluttered, noisy ground under light from one side. Coarse
questions ask for what covers many patches, fine questions for what covers one; many take several looks.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image

from dpn_cli.demo.drawing import draw
from dpn_cli.demo.glyphs import DIGITS, LETTERS
from dpn_cli.demo.layout import compose
from dpn_cli.demo.questions import GRAINS, KINDS, NUMBERS, SIDES, Grain, Look, Turn, ask
from dpn_cli.demo.scene import COLOURS, GRID, PATCH, PATTERNS, SHAPES, SIZE, Scene, Split
from dpn_cli.demo.wording import CLOSINGS, MORE, OPENINGS, WORDINGS

__all__ = ["GRAINS", "GRID", "KINDS", "PATCH", "SIZE", "Grain", "Sample", "Scene", "Split", "Turn", "samples", "scenes"]


@dataclass(frozen=True)
class Sample:
    """A picture with one question, for calibration and evaluation; it is drawn when it is asked for."""

    id: str
    scene: Scene
    question: str
    answer: str
    kind: str
    grain: Grain
    looks: tuple[Look, ...] = ()

    @property
    def image(self) -> Image.Image:
        """Draw the picture."""
        return Image.fromarray(draw(self.scene))


def stream(split: Split, seed: int = 0) -> Random:
    """Return the source of chance of a stream: the same in any process for equal arguments."""
    key = hashlib.sha256(f"{split}/{seed}".encode()).digest()
    return Random(int.from_bytes(key[:8], "little"))


def scenes(split: Split, seed: int = 0) -> Iterator[Scene]:
    """Yield scenes of a split without end.

    Args:
        split: Which of the disjoint splits to draw from.
        seed: Names the stream; equal arguments give equal scenes in any process.
    """
    rng = stream(split, seed)
    while True:
        scene = compose(rng)
        if scene.split == split:
            yield scene


def samples(split: Split, count: int, seed: int = 0) -> Iterator[Sample]:
    """Yield one-question samples, the kinds of question in turn.

    Args:
        split: Which of the disjoint splits to draw from.
        count: Number of samples.
        seed: Names the stream; equal arguments give equal samples in any process.
    """
    endless, rng = scenes(split, seed), Random(seed)
    for index in range(count):
        turn = None
        while turn is None:
            scene = next(endless)
            turn = ask(KINDS[index % len(KINDS)], scene, rng)
        grain = GRAINS[turn.kind]
        yield Sample(f"{split}-{seed}-{index}", scene, turn.question, turn.answer, turn.kind, grain, turn.looks)


def corpus() -> list[str]:
    """List texts that hold every word of every question and answer, for the tokenizer."""
    names = (*SHAPES, *COLOURS, *PATTERNS, *NUMBERS, *SIDES, "crosses", "shapes", "shape", "thing", "sign", "upper")
    more = ("lower", "smallest", "largest", "leftmost", "rightmost", "topmost", "bottommost", "letter", "digit")
    words = [f" {name}" for name in (*names, *more, *(f"{shape}s" for shape in SHAPES))]
    questions = [wording for group in (*WORDINGS.values(), *MORE.values(), OPENINGS, CLOSINGS) for wording in group]
    letters = [f" {text}{text}" for text in LETTERS] + [f" {text}" for text in DIGITS]
    openings = [f" {wording}" for wording in questions]
    return [*words, *questions, *openings, *letters, " left, right", " red shape: red."]
