"""What each vision patch of a demo picture shows: the dense labels that pre-train the vision tower."""

import numpy as np
from numpy.typing import NDArray

from dpn_cli.demo.glyphs import DIGITS, LETTERS
from dpn_cli.demo.pictures import COLOURS, GRID, NUMBERS, PATCH, SHAPES, Scene, Thing

CLASSES: dict[str, int] = {
    "background": len(COLOURS),
    "count": len(NUMBERS),
    "colour": 1 + len(COLOURS),
    "shape": 1 + len(SHAPES),
    "glyph": 1 + len(DIGITS) + len(LETTERS),
    "row": 1 + len(("upper", "lower")),
    "column": 1 + len(("left", "right")),
}
"""Number of classes per attribute; class 0 of the last five means "nothing here"."""

_COLOURS, _SHAPES, _GLYPHS = tuple(COLOURS), SHAPES, DIGITS + LETTERS


def patch_labels(scene: Scene) -> NDArray[np.int64]:
    """Label every patch of a picture.

    Returns:
        Array of shape (attributes, ``GRID`` * ``GRID``), attributes in the order of ``CLASSES``.
    """
    labels = np.zeros((len(CLASSES), GRID, GRID), dtype=np.int64)
    labels[0] = _COLOURS.index(scene.background)
    labels[1] = len(scene.things) - 1
    for thing in scene.things:
        rows, columns = _extent(thing)
        labels[2, rows, columns] = 1 + _COLOURS.index(thing.colour)
        labels[3, rows, columns] = 1 + _SHAPES.index(thing.shape)
        for character, patch in zip(thing.mark.characters, thing.mark.patches, strict=True):
            labels[4][patch] = 1 + _GLYPHS.index(character)
            labels[5][patch], labels[6][patch] = 1 + patch[0] % 2, 1 + patch[1] % 2
    return labels.reshape(len(CLASSES), -1)


def _extent(thing: Thing) -> tuple[slice, slice]:
    """Say which patches lie well within the shape's bounding box, its plates among them."""
    reach = thing.radius - PATCH // 2
    x, y = thing.centre
    return (
        slice(-(-(y - reach) // PATCH), (y + reach) // PATCH),
        slice(-(-(x - reach) // PATCH), (x + reach) // PATCH),
    )
