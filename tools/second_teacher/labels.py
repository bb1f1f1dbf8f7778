"""What each patch of a poster shows: the dense labels that help the vision tower to start."""

import numpy as np
from numpy.typing import NDArray

from tools.second_teacher.scene import CORNERS, FORMS, GRID, INKS, LETTERS, PAPERS, Poster

ROLES = ("corner", "emblem", "word")
CLASSES = {
    "paper": len(PAPERS),
    "noisy": 2,
    "ink": 1 + len(INKS),
    "form": 1 + len(FORMS),
    "part": 1 + 9,
    "letter": 1 + len(LETTERS),
    "role": 1 + len(ROLES),
    "index": 1 + 4,
    "row": GRID,
    "column": GRID,
}
"""Number of classes of every label; class 0 of those with one more than there are names means "nothing here"."""

_NAMES = list(CLASSES)
_PAPERS, _INKS = list(PAPERS), list(INKS)


def patch_labels(poster: Poster) -> NDArray[np.uint8]:
    """Label every patch of a poster.

    Returns:
        Array of shape (labels, ``GRID`` * ``GRID``), labels in the order of ``CLASSES``.
    """
    labels = np.zeros((len(CLASSES), GRID, GRID), dtype=np.uint8)
    by_name = dict(zip(_NAMES, labels, strict=True))
    by_name["paper"][:], by_name["noisy"][:] = _PAPERS.index(poster.paper), poster.noisy
    by_name["row"][:], by_name["column"][:] = np.indices((GRID, GRID))
    writing = [(patch, letter, 1, 0) for patch, letter in zip(CORNERS.values(), poster.corners, strict=False)]
    for emblem in poster.emblems:
        for part, patch in enumerate(emblem.patches):
            by_name["ink"][patch], by_name["form"][patch] = 1 + _INKS.index(emblem.ink), 1 + FORMS.index(emblem.form)
            by_name["part"][patch] = 1 + part
        writing.append((emblem.middle, emblem.letter, 2, 0))
    for word in poster.words:
        for index, (patch, letter) in enumerate(zip(word.patches, word.letters, strict=True)):
            by_name["ink"][patch] = 1 + _INKS.index(word.ink)
            writing.append((patch, letter, 3, 1 + index))
    for patch, letter, role, index in writing:
        by_name["letter"][patch] = 1 + LETTERS.index(letter)
        by_name["role"][patch], by_name["index"][patch] = role, index
    return labels.reshape(len(CLASSES), -1)
