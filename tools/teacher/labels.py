"""What each vision patch of a demo picture shows: the dense labels that help the vision tower to start."""

import numpy as np
from numpy.typing import NDArray

from dpn_cli.demo.drawing import owners
from dpn_cli.demo.glyphs import GLYPHS
from dpn_cli.demo.scene import COLOURS, GRID, PATCH, PATTERNS, SHAPES, SIZES, Scene, Thing

ROLES = ("mark", "stop", "left", "right", "sign", "large sign")
LETTERS_OF_A_WORD = 8
CLASSES: dict[str, int] = {
    "pattern": len(PATTERNS),
    "colour": len(COLOURS),
    "shape": 1 + len(SHAPES),
    "size": 1 + len(SIZES),
    "glyph": 1 + len(GLYPHS),
    "role": 1 + len(ROLES),
    "index": 1 + LETTERS_OF_A_WORD,
    "row": GRID,
    "column": GRID,
}
"""Number of classes per attribute; class 0 of those with one more than there are names means "nothing here"."""

_COLOURS = tuple(COLOURS)


def patch_labels(scene: Scene) -> NDArray[np.uint8]:
    """Label every patch of a picture with what shows in its middle, or is written on it.

    Returns:
        Array of shape (attributes, ``GRID`` * ``GRID``), attributes in the order of ``CLASSES``.
    """
    labels = np.zeros((len(CLASSES), GRID, GRID), dtype=np.uint8)
    labels[7:] = np.indices((GRID, GRID))
    labels[0] = PATTERNS.index(scene.ground.pattern)
    ground = [_COLOURS.index(scene.ground.colour), 0, 0]
    table = np.array([ground, *(_thing(thing) for thing in scene.things)], dtype=np.uint8)
    owner = owners(scene)[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    labels[1:4] = table[np.where(owner > len(scene.things), 0, owner)].transpose(2, 0, 1)
    for thing in scene.things:
        if thing.mark:
            labels[(slice(1, 6), *thing.mark.patch)] = (*_thing(thing), 1 + GLYPHS.index(thing.mark.text), 1)
    for stop in scene.stops:
        for patch, text, role in zip(stop.patches, (stop.left, stop.name, stop.right), (3, 2, 4), strict=True):
            labels[(slice(2, 6), *patch)] = (0, 0, 1 + GLYPHS.index(text), role)
    for sign in scene.signs:
        for index, letter in enumerate(sign.word):
            for patch in sign.letter(index):
                written = (_COLOURS.index(sign.colour), 0, 0, 1 + GLYPHS.index(letter), 4 + sign.scale, 1 + index)
                labels[(slice(1, 7), *patch)] = written
    return labels.reshape(len(CLASSES), -1)


def _thing(thing: Thing) -> list[int]:
    return [_COLOURS.index(thing.colour), 1 + SHAPES.index(thing.shape), 1 + SIZES.index(thing.size)]
