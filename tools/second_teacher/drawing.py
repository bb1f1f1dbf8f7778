"""Drawing a poster with Pillow, its letters in the fonts that matplotlib ships: the same pixels every time."""

from functools import lru_cache
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tools.second_teacher.scene import CORNERS, INKS, PAPERS, PATCH, SIZE, Emblem, Poster

_POINTS = 11
_PALE = (250, 250, 250)
_BLACK = INKS["black"]


def draw(poster: Poster) -> NDArray[np.uint8]:
    """Draw a poster: RGB, shape (``SIZE``, ``SIZE``, 3)."""
    rng = np.random.default_rng(poster.number)
    canvas = Image.new("RGB", (SIZE, SIZE), PAPERS[poster.paper])
    pen = ImageDraw.Draw(canvas)
    writing = [(patch, letter, _BLACK) for patch, letter in zip(CORNERS.values(), poster.corners, strict=False)]
    for emblem in poster.emblems:
        _form(pen, emblem)
        writing.append((emblem.middle, emblem.letter, _PALE))
    for word in poster.words:
        writing += [(p, c, INKS[word.ink]) for p, c in zip(word.patches, word.letters, strict=True)]
    shifts = rng.integers(-1, 2, size=(len(writing), 2)).tolist()
    for ((row, column), letter, ink), (dx, dy) in zip(writing, shifts, strict=True):
        middle = (column * PATCH + PATCH // 2 + dx, row * PATCH + PATCH // 2 + dy)
        pen.text(middle, letter, fill=ink, font=_font(poster.font), anchor="mm")
    noise = rng.normal(0, 26 if poster.noisy else 4, size=(SIZE, SIZE, 3))
    return (np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8)


@lru_cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(file, _POINTS, layout_engine=ImageFont.Layout.BASIC)  # the other is not everywhere


def _form(pen: ImageDraw.ImageDraw, emblem: Emblem) -> None:
    row, column = emblem.patch
    left, top, side = column * PATCH, row * PATCH, 3 * PATCH - 1
    x, y, ink = left + side / 2, top + side / 2, INKS[emblem.ink]
    if emblem.form == "disc":
        pen.ellipse((left + 1, top + 1, left + side - 1, top + side - 1), fill=ink)
    elif emblem.form == "square":
        pen.rectangle((left + 2, top + 2, left + side - 2, top + side - 2), fill=ink)
    elif emblem.form == "triangle":
        pen.polygon([(x, top - 2), (left, top + side), (left + side, top + side)], fill=ink)
    else:
        turns = [(pi * i / 5, 16 if i % 2 == 0 else 8) for i in range(10)]
        pen.polygon([(x + r * sin(a), y - r * cos(a)) for a, r in turns], fill=ink)
