"""What can be asked about a poster: for every kind one function that draws a question, its answer and where to look."""

from collections import Counter
from collections.abc import Callable
from random import Random

from dpn_cli.demo.questions import Grain, Turn
from dpn_cli.demo.scene import Patch
from tools.second_teacher.scene import CORNERS, FORMS, INKS, LETTERS, Emblem, Poster

NUMBERS = ("zero", "one", "two", "three", "four")
WORDINGS: dict[str, tuple[str, ...]] = {
    "paper": ("What colour is the paper?", "Which colour is the background?"),
    "noise": ("Is the paper clean or noisy?",),
    "count": ("How many {} are there?", "Count the {}."),
    "colour": ("What colour is the {}?", "Which colour has the {}?"),
    "side": ("Is the {} left or right of the {other}?",),
    "word": ("What is the {} word?", "Read the {} word."),
    "ink": ("What colour is the word {}?", "Which colour has {}?"),
    "corner": ("What letter is {}?", "Read the {} corner."),
    "badge": ("What letter is on the {}?", "Read the {}."),
}


def _put(kind: str, rng: Random, answer: str, look: tuple[Patch, ...], name: str = "", other: str = "") -> Turn:
    wording = rng.choice(WORDINGS["noise" if answer in ("clean", "noisy") else kind])
    return Turn(kind, wording.format(name, other=other), answer, (look,) if look else ())


def _single(poster: Poster) -> list[Emblem]:
    """Return the emblems whose form no other has."""
    forms = Counter(emblem.form for emblem in poster.emblems)
    return [emblem for emblem in poster.emblems if forms[emblem.form] == 1]


def _paper(poster: Poster, rng: Random) -> Turn | None:
    answer = poster.paper if rng.random() < 0.6 else "noisy" if poster.noisy else "clean"
    return _put("paper", rng, answer, ())


def _count(poster: Poster, rng: Random) -> Turn | None:
    form = rng.choice(FORMS if rng.random() < 0.4 or not poster.emblems else [e.form for e in poster.emblems])
    found = [emblem for emblem in poster.emblems if emblem.form == form]
    return _put("count", rng, NUMBERS[len(found)], tuple(p for e in found for p in e.patches), f"{form}s")


def _colour(poster: Poster, rng: Random) -> Turn | None:
    options = _single(poster)
    emblem = rng.choice(options) if options else None
    return _put("colour", rng, emblem.ink, emblem.patches, emblem.form) if emblem else None


def _side(poster: Poster, rng: Random) -> Turn | None:
    options = _single(poster)
    if len(options) < 2:
        return None
    one, two = rng.sample(options, 2)
    apart = one.patch[1] - two.patch[1]
    side = "left" if apart < 0 else "right"
    return _put("side", rng, side, one.patches + two.patches, one.form, two.form) if abs(apart) >= 2 else None


def _word(poster: Poster, rng: Random) -> Turn | None:
    word = rng.choice(poster.words) if poster.words else None
    return _put("word", rng, word.letters, word.patches, word.ink) if word else None


def _ink(poster: Poster, rng: Random) -> Turn | None:
    word = rng.choice(poster.words) if poster.words else None
    return _put("ink", rng, word.ink, word.patches, word.letters) if word else None


def _corner(poster: Poster, rng: Random) -> Turn | None:
    if not poster.corners:
        return None
    index, (name, patch) = rng.choice(list(enumerate(CORNERS.items())))
    return _put("corner", rng, poster.corners[index], (patch,), name)


def _badge(poster: Poster, rng: Random) -> Turn | None:
    options = _single(poster)
    emblem = rng.choice(options) if options else None
    return _put("badge", rng, emblem.letter, (emblem.middle,), emblem.form) if emblem else None


_DRAWS: dict[str, tuple[Grain, Callable[[Poster, Random], Turn | None]]] = {
    "paper": ("coarse", _paper),
    "count": ("coarse", _count),
    "colour": ("coarse", _colour),
    "side": ("coarse", _side),
    "word": ("fine", _word),
    "ink": ("fine", _ink),
    "corner": ("fine", _corner),
    "badge": ("fine", _badge),
}
GRAINS: dict[str, Grain] = {kind: grain for kind, (grain, _) in _DRAWS.items()}


def ask(kind: str, poster: Poster, rng: Random) -> Turn | None:
    """Draw a question of a kind, or none where the poster has nothing to ask about."""
    return _DRAWS[kind][1](poster, rng)


def corpus() -> list[str]:
    """List texts that hold every word of every question and answer, for the tokenizer."""
    questions = [wording for wordings in WORDINGS.values() for wording in wordings]
    names = [*FORMS, *(f"{form}s" for form in FORMS), *INKS, *CORNERS, *NUMBERS, *LETTERS]
    names += ["white", "pink", "yellow", "grey", "clean", "noisy", "left", "right"]
    return [*questions, *(f" {name}" for name in names)] * 3
