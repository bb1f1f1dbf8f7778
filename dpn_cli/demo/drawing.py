"""Drawing a scene: the same pixels every time."""

from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dpn_cli.demo.glyphs import bitmap
from dpn_cli.demo.scene import COLOURS, GRID, PATCH, SIZE, Ground, Patch, Scene, Thing

_INK, _CHALK = 12, 243
_STRAY = 240
"""Labels from here on are stray lines and dots; smaller ones are 1 + the index of a thing; 0 is the ground."""
_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE


def owners(scene: Scene) -> NDArray[np.uint8]:
    """Say which thing each pixel shows: 1 + its index; 0 is the ground, what is over 239 clutter."""
    canvas = Image.new("L", (SIZE, SIZE))
    pen = ImageDraw.Draw(canvas)
    rng = np.random.default_rng(scene.number)
    for index, (x, y, dx, dy) in enumerate(rng.integers(0, SIZE, size=(scene.ground.clutter, 4)).tolist()):
        if index % 2:
            pen.line((x, y, x + (dx - SIZE // 2) // 3, y + (dy - SIZE // 2) // 3), fill=_STRAY + index)
        else:
            pen.ellipse((x - 1, y - 1, x + 1, y + 1), fill=_STRAY + index)
    for index, thing in enumerate(scene.things):
        _draw_shape(pen, thing, 1 + index)
    return np.asarray(canvas)


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene: RGB, shape (``SIZE``, ``SIZE``, 3)."""
    rng = np.random.default_rng(scene.number + 1)
    owner = owners(scene)
    palette = rng.integers(0, 256, size=(256, 3)).astype(np.int16)
    for index, thing in enumerate(scene.things):
        palette[1 + index] = np.array(COLOURS[thing.colour]) + rng.integers(-14, 15, size=3)
    pixels = np.where((owner == 0)[..., None], _ground(scene.ground, rng), palette[owner])
    pixels += _slope(rng, 28)[..., None]
    for patch, character, scale, plate, ink in _writing(scene):
        corner = (patch[0] * PATCH + scene.shift[0], patch[1] * PATCH + scene.shift[1])
        _stamp(pixels, corner, character, scale, plate, ink, rng)
    strength = int(rng.integers(8, 29))
    noise = rng.integers(-strength, strength + 1, size=pixels.shape, dtype=np.int8)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def _writing(scene: Scene) -> list[tuple[Patch, str, int, tuple[int, ...], int]]:
    """List every glyph: its patch, its character, its scale, the colour of its plate and the grey of its ink."""
    glyphs: list[tuple[Patch, str, int, tuple[int, ...], int]] = []
    for thing in scene.things:
        if thing.mark:
            plate = tuple(channel // 2 + 125 for channel in COLOURS[thing.colour])
            glyphs.append((thing.mark.patch, thing.mark.text, 1, plate, _INK))
    for stop in scene.stops:
        plates = ((40, 60, 90), (220, 235, 235), (40, 60, 90))
        texts = (stop.left, stop.name, stop.right)
        for patch, text, plate, ink in zip(stop.patches, texts, plates, (_CHALK, _INK, _CHALK), strict=True):
            glyphs.append((patch, text, 1, plate, ink))
    for sign in scene.signs:
        plate = COLOURS[sign.colour]
        ink = _INK if sum(plate) > 330 else _CHALK
        glyphs += [(sign.letter(i)[0], letter, sign.scale, plate, ink) for i, letter in enumerate(sign.word)]
    return glyphs


def _stamp(
    pixels: NDArray[np.int16],
    corner: tuple[int, int],
    character: str,
    scale: int,
    plate: tuple[int, ...],
    ink: int,
    rng: np.random.Generator,
) -> None:
    glyph = bitmap(character, scale)
    height, width = glyph.shape
    side = PATCH * scale
    row, column = rng.integers(side - height + 1), rng.integers(side - width + 1)
    area = pixels[corner[0] :, corner[1] :][:side, :side]
    area[:] = plate
    area[row : row + height, column : column + width][glyph] = ink


def _ground(ground: Ground, rng: np.random.Generator) -> NDArray[np.int16]:
    """Paint the pattern of the ground: two shades of its colour."""
    colour = np.array(COLOURS[ground.colour], dtype=np.float32) + rng.integers(-14, 15, size=3)
    shift = rng.integers(35, 61) * (1 if colour.sum() < 380 else -1)
    return (colour + shift * _pattern(ground.pattern, rng)[..., None]).astype(np.int16)


def _pattern(name: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return where the second shade shows, from 0 to 1."""
    period = rng.uniform(7, 15) / SIZE
    angle = rng.uniform(0, pi)
    along = (_COLUMNS * cos(angle) + _ROWS * sin(angle)) / period
    across = (_ROWS * cos(angle) - _COLUMNS * sin(angle)) / period
    if name == "striped":
        return (along % 1 < 0.5).astype(np.float32)
    if name == "checked":
        return ((along % 1 < 0.5) ^ (across % 1 < 0.5)).astype(np.float32)
    if name == "dotted":
        return ((along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.09).astype(np.float32)
    if name == "cloudy":
        coarse = Image.fromarray(rng.integers(0, 256, size=(GRID // 2, GRID // 2), dtype=np.uint8))
        return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float32) / np.float32(255)
    return np.zeros((SIZE, SIZE), dtype=np.float32)


def _slope(rng: np.random.Generator, most: int) -> NDArray[np.int16]:
    """Return the light that falls from one side: a gradient over the whole picture."""
    angle, strength = rng.uniform(0, 2 * pi), rng.uniform(0, most)
    slope = (_COLUMNS - 0.5) * (strength * 2 * cos(angle)) + (_ROWS - 0.5) * (strength * 2 * sin(angle))
    return slope.astype(np.int16)


def _draw_shape(pen: ImageDraw.ImageDraw, thing: Thing, fill: int) -> None:
    (x, y), r = thing.centre, thing.radius
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        side = r * 7 // 8
        pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif thing.shape == "cross":
        arm = r * 2 // 5
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
    else:
        pen.polygon(_outline(thing), fill=fill)


def _outline(thing: Thing) -> list[tuple[float, float]]:
    (x, y), r = thing.centre, thing.radius
    if thing.shape == "triangle":
        return [(x, y - r), (x - r, y + r), (x + r, y + r)]
    if thing.shape == "diamond":
        return [(x, y - r), (x + 0.7 * r, y), (x, y + r), (x - 0.7 * r, y)]
    angles = [pi * (i / 5 - 0.5) for i in range(10)]
    lengths = [r + 1 if i % 2 == 0 else 0.42 * r for i in range(10)]
    return [(x + length * cos(a), y + length * sin(a)) for a, length in zip(angles, lengths, strict=True)]
