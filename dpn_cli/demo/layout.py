"""Composing a scene: what it shows and where, so that everything can be told apart and read."""

from random import Random

from dpn_cli.demo.glyphs import DIGITS, LETTERS
from dpn_cli.demo.scene import (
    COLOURS,
    GRID,
    PATCH,
    PATTERNS,
    SHAPES,
    SIZE,
    Ground,
    Mark,
    Patch,
    Scene,
    Sign,
    Stop,
    Thing,
)

RADII = {"small": (7, 8), "medium": (12, 14), "large": (18, 21)}
TRIES = 20
SHIFTS = range(-3, 5)
_ONSETS, _VOWELS = "BCDFGHJKLMNPRSTVWXZ", "AEIOUY"


def compose(rng: Random) -> Scene:
    """Draw one scene at random."""
    colours = rng.sample(tuple(COLOURS), rng.randint(4, 6))
    taken: set[Patch] = set()
    ground = Ground(colours[0], rng.choice(PATTERNS), rng.randint(0, 12))
    signs = _signs(rng, colours[1:], taken)
    stops = _stops(rng, taken) if rng.random() < 0.6 else ()
    things = _things(rng, colours[1:], taken)
    return Scene(ground, things, stops, signs, (rng.choice(SHIFTS), rng.choice(SHIFTS)))


def _word(rng: Random, length: int) -> str:
    """Make up a word that can be pronounced: consonants and vowels by turns, now and then a pair of consonants."""
    letters, vowel = "", rng.random() < 0.4
    while len(letters) < length:
        letters += rng.choice(_VOWELS if vowel else _ONSETS)
        vowel = not vowel if vowel or rng.random() < 0.8 else vowel
    return letters


def _signs(rng: Random, colours: list[str], taken: set[Patch]) -> tuple[Sign, ...]:
    signs = []
    for colour in rng.sample(colours, rng.randint(1, 3)):
        scale = 2 if rng.random() < 0.3 else 1
        word = _word(rng, rng.randint(4, 6 if scale == 2 else 8))
        patch = _free(rng, taken, scale, scale * len(word))
        if patch:
            signs.append(Sign(word, colour, scale, patch))
    return tuple(signs)


def _stops(rng: Random, taken: set[Patch]) -> tuple[Stop, ...]:
    names = rng.sample(LETTERS, rng.randint(4, 6))
    stops = []
    for name in names:
        left, right = rng.sample([other for other in names if other != name], 2)
        patch = _free(rng, taken, 1, 3)
        if patch is None:
            return ()
        stops.append(Stop(name, left, right, patch))
    return tuple(stops)


def _free(rng: Random, taken: set[Patch], height: int, width: int) -> Patch | None:
    """Find a place for a plate with a free patch on either side, and take it."""
    for _ in range(TRIES):
        row, column = rng.randint(1, GRID - 1 - height), rng.randint(1, GRID - 1 - width)
        rows = range(row, row + height)
        if not any((r, c) in taken for r in rows for c in range(column - 1, column + width + 1)):
            taken.update((r, c) for r in rows for c in range(column, column + width))
            return row, column
    return None


def _things(rng: Random, colours: list[str], taken: set[Patch]) -> tuple[Thing, ...]:
    shapes = rng.sample(SHAPES, rng.randint(3, 5))
    things: list[Thing] = []
    for _ in range(rng.randint(4, 12)):
        thing = _thing(rng, rng.choice(shapes), rng.choice(colours), things, taken)
        if thing:
            things.append(thing)
    return tuple(things)


def _thing(rng: Random, shape: str, colour: str, things: list[Thing], taken: set[Patch]) -> Thing | None:
    size = rng.choice(("small", "small", "medium", "medium", "large"))
    marked = rng.random() < 0.75
    for _ in range(TRIES):
        radius = rng.randint(*RADII[size])
        centre = (rng.randint(radius, SIZE - 1 - radius), rng.randint(radius, SIZE - 1 - radius))
        patch = _mark_patch(centre, radius, size)
        thing = Thing(shape, colour, size, centre, radius, Mark(_character(rng), patch) if marked else None)
        if _fits(thing, patch, things, taken):
            if marked:
                taken.add(patch)
            return thing
    return None


def _character(rng: Random) -> str:
    return rng.choice(LETTERS if rng.random() < 0.6 else DIGITS)


def _mark_patch(centre: tuple[int, int], radius: int, size: str) -> Patch:
    """Say where a thing's mark goes: on its middle, or to the right of a small one."""
    x, y = centre
    return y // PATCH, (x + radius) // PATCH + 1 if size == "small" else x // PATCH


def _fits(thing: Thing, patch: Patch, things: list[Thing], taken: set[Patch]) -> bool:
    """Say whether a thing leaves enough of all others visible, and they of it."""
    x, y = thing.centre
    if patch in taken or not all(0 < each < GRID - 1 for each in patch) or (y // PATCH, x // PATCH) in taken:
        return False
    for other in things:
        far = (x - other.centre[0]) ** 2 + (y - other.centre[1]) ** 2
        if far < (0.7 * (thing.radius + other.radius)) ** 2:
            return False
        if _covers(other, patch) or (other.mark and _covers(thing, other.mark.patch)):
            return False
    return 4 * sum(each in taken for each in thing.patches) <= len(thing.patches)


def _covers(thing: Thing, patch: Patch) -> bool:
    (x, y), (row, column) = thing.centre, patch
    half = PATCH // 2
    reach = thing.radius + half
    return abs(column * PATCH + half - x) < reach and abs(row * PATCH + half - y) < reach
