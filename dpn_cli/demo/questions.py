"""What can be asked about a scene: for every kind one function that draws a question, its answer and where to look."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from random import Random
from typing import Literal

from dpn_cli.demo.scene import COLOURS, SHAPES, Mark, Patch, Scene, Sign, Stop, Thing
from dpn_cli.demo.wording import CLOSINGS, MORE, OPENINGS, WORDINGS

Grain = Literal["coarse", "fine"]
Look = tuple[Patch, ...]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
SIDES = ("left", "right", "above", "below")
APART = 16
"""How many pixels further than all others the leftmost (and so on) thing lies."""


@dataclass(frozen=True)
class Turn:
    """One question about a picture.

    Attributes:
        kind: One of ``KINDS``.
        question: The question in one of many wordings.
        answer: A word, a number of letters, or a list.
        looks: The patches that each look must see, in the order of the looks; the last look gives the answer.
        about: The thing that it is about, if it is about one.
    """

    kind: str
    question: str
    answer: str
    looks: tuple[Look, ...] = ()
    about: Thing | None = None


@dataclass(frozen=True)
class Named:
    """A thing with a description that fits no other, and the looks that finding it takes."""

    thing: Thing
    name: str
    looks: tuple[Look, ...]


Draw = Callable[[Scene, Random], Turn | None]


def _put(
    kind: str,
    wording: str,
    rng: Random,
    answer: str,
    looks: tuple[Look, ...] = (),
    name: str = "",
    other: str = "",
    about: Thing | None = None,
) -> Turn:
    question = rng.choice(WORDINGS[wording]).format(name, other=other)
    return Turn(kind, f"{rng.choice(OPENINGS)}{question}{rng.choice(CLOSINGS)}", answer, looks, about)


@lru_cache(maxsize=8)
def plain_names(scene: Scene) -> tuple[Named, ...]:
    """Name every thing whose shape and colour no other has, as shortly as is clear or in full."""
    pairs = Counter((thing.colour, thing.shape) for thing in scene.things)
    return tuple(
        Named(thing, f"{thing.colour} {thing.shape}", (thing.patches,))
        for thing in scene.things
        if pairs[thing.colour, thing.shape] == 1
    )


@lru_cache(maxsize=8)
def extreme_names(scene: Scene) -> tuple[Named, ...]:
    """Name things that are the smallest, largest or outermost of several of one shape or colour."""
    groups: dict[str, list[Thing]] = {}
    for thing in scene.things:
        groups.setdefault(f"{thing.colour} shape", []).append(thing)
        groups.setdefault(thing.shape, []).append(thing)
    named: list[Named] = []
    for group, things in groups.items():
        if len(things) > 1:
            seen = tuple(patch for thing in things for patch in thing.patches)
            named += [Named(thing, f"{word} {group}", (seen,)) for word, thing in _extremes(things)]
    return tuple(named)


def _extremes(things: list[Thing]) -> Iterable[tuple[str, Thing]]:
    measures: tuple[tuple[str, Callable[[Thing], int], int], ...] = (
        ("smallest", lambda thing: -thing.radius, 4),
        ("largest", lambda thing: thing.radius, 4),
        ("leftmost", lambda thing: -thing.centre[0], APART),
        ("rightmost", lambda thing: thing.centre[0], APART),
        ("topmost", lambda thing: -thing.centre[1], APART),
        ("bottommost", lambda thing: thing.centre[1], APART),
    )
    for word, measure, margin in measures:
        second, first = sorted(things, key=measure)[-2:]
        if measure(first) - measure(second) >= margin:
            yield word, first


def _background(scene: Scene, rng: Random) -> Turn | None:
    if rng.random() < 0.5:
        return _put("background", "ground colour", rng, scene.ground.colour)
    return _put("background", "ground pattern", rng, scene.ground.pattern)


def _count(scene: Scene, rng: Random) -> Turn | None:
    shapes = Counter(thing.shape for thing in scene.things)
    colours = Counter(thing.colour for thing in scene.things)
    options = [(f"{shape}s" if shape != "cross" else "crosses", shapes[shape]) for shape in SHAPES]
    options += [(f"{colour} shapes", colours[colour]) for colour in COLOURS if colours[colour]]
    wanted = rng.randint(0, 5)
    name, number = min(options, key=lambda option: (abs(option[1] - wanted), rng.random()))
    if number >= len(NUMBERS):
        return None
    seen = tuple(p for thing in scene.things if name.startswith((thing.shape, thing.colour)) for p in thing.patches)
    return _put("count", "count", rng, NUMBERS[number], (seen,), name)


def _colour(scene: Scene, rng: Random) -> Turn | None:
    shapes = Counter(thing.shape for thing in scene.things)
    options = [(t.shape, t) for t in scene.things if shapes[t.shape] == 1]
    options += [(n.name, n.thing) for n in extreme_names(scene) if not n.name.endswith("shape")]
    if not options:
        return None
    name, thing = rng.choice(options)
    return _put("colour", "colour", rng, thing.colour, (thing.patches,), name, about=thing)


def _shape(scene: Scene, rng: Random) -> Turn | None:
    colours = Counter(thing.colour for thing in scene.things)
    options = [(f"{t.colour} thing", t) for t in scene.things if colours[t.colour] == 1]
    options += [(n.name.replace("shape", "thing"), n.thing) for n in extreme_names(scene) if n.name.endswith("shape")]
    if not options:
        return None
    name, thing = rng.choice(options)
    return _put("shape", "shape", rng, thing.shape, (thing.patches,), name, about=thing)


def _list(scene: Scene, rng: Random) -> Turn | None:
    there = {thing.shape for thing in scene.things}
    seen = tuple(patch for thing in scene.things for patch in thing.patches)
    answer = ", ".join(shape for shape in SHAPES if shape in there)
    return _put("list", "list", rng, answer, (seen,)) if there else None


def _relation(scene: Scene, rng: Random) -> Turn | None:
    names = list(plain_names(scene))
    rng.shuffle(names)
    for first, second in pairwise(names):
        dx, dy = (a - b for a, b in zip(first.thing.centre, second.thing.centre, strict=True))
        if max(abs(dx), abs(dy)) >= 2 * min(abs(dx), abs(dy)) + 4:
            side = SIDES[int(dx > 0)] if abs(dx) > abs(dy) else SIDES[2 + int(dy > 0)]
            wording = rng.choice(("relation", "beside" if abs(dx) > abs(dy) else "over"))
            return _put("relation", wording, rng, side, first.looks + second.looks, first.name, second.name)
    return None


def _mark(kind: str, naming: Callable[[Scene], tuple[Named, ...]], scene: Scene, rng: Random) -> Turn | None:
    options = [named for named in naming(scene) if named.thing.mark]
    if not options:
        return None
    named = rng.choice(options)
    assert named.thing.mark
    looks = (*named.looks, (named.thing.mark.patch,))
    return _put(kind, _sort(named.thing.mark), rng, named.thing.mark.text, looks, named.name, about=named.thing)


@lru_cache(maxsize=8)
def marked_names(scene: Scene) -> tuple[Named, ...]:
    """Name every thing by its letter or digit, where no other thing has the same."""
    texts = Counter(thing.mark.text for thing in scene.things if thing.mark)
    return tuple(
        Named(thing, f"{_sort(thing.mark)} {thing.mark.text}", ((thing.mark.patch,), thing.patches))
        for thing in scene.things
        if thing.mark and texts[thing.mark.text] == 1
    )


def _sort(mark: Mark) -> str:
    return "digit" if mark.text.isdigit() else "letter"


def _owner(scene: Scene, rng: Random) -> Turn | None:
    options = marked_names(scene)
    if not options:
        return None
    named = rng.choice(options)
    wording, answer = rng.choice((("owner shape", named.thing.shape), ("owner colour", named.thing.colour)))
    return _put("owner", wording, rng, answer, named.looks, named.name, about=named.thing)


def _compare(scene: Scene, rng: Random) -> Turn | None:
    options = [(n, n.thing.mark) for n in plain_names(scene) if n.thing.mark and n.thing.mark.text.isdigit()]
    if len(options) < 2:
        return None
    (first, one), (second, two) = rng.sample(options, 2)
    if one.text == two.text:
        return None
    wording, pick = rng.choice((("larger", max), ("smaller", min)))
    looks = (*first.looks, *second.looks, (one.patch, two.patch))
    return _put("compare", wording, rng, pick(one.text, two.text), looks, first.name, second.name)


def _sign_names(scene: Scene) -> list[tuple[str, Sign]]:
    names = [(f"{sign.colour} sign", sign) for sign in scene.signs]
    by_height = sorted(scene.signs, key=lambda sign: sign.patch[0])
    if len(by_height) > 1:
        names += [("upper sign", by_height[0])] * (by_height[0].patch[0] + 1 < by_height[1].patch[0])
        names += [("lower sign", by_height[-1])] * (by_height[-2].patch[0] + 1 < by_height[-1].patch[0])
    return names


def _word(scene: Scene, rng: Random) -> Turn | None:
    options = _sign_names(scene)
    if not options:
        return None
    name, sign = rng.choice(options)
    return _put("word", "word", rng, sign.word, (sign.patches,), name)


def _after(scene: Scene, rng: Random) -> Turn | None:
    options = [
        (name, sign, index)
        for name, sign in _sign_names(scene)
        for index, letter in enumerate(sign.word[:-1])
        if sign.word.count(letter) == 1
    ]
    if not options:
        return None
    name, sign, at = rng.choice(options)
    looks = (sign.letter(at), sign.letter(at + 1))
    return _put("after", "after", rng, sign.word[at + 1], looks, sign.word[at], name)


def _lead(scene: Scene, rng: Random) -> Turn | None:
    signs = {sign.colour: sign for sign in scene.signs}
    shapes = Counter(thing.shape for thing in scene.things)
    options = [Named(t, t.shape, (t.patches,)) for t in scene.things if shapes[t.shape] == 1]
    options += [named for named in extreme_names(scene) if not named.name.endswith("shape")]
    options += [Named(n.thing, f"thing with the {n.name}", n.looks) for n in marked_names(scene)]
    options = [named for named in options if named.thing.colour in signs]
    if len(signs) < 2 or not options:
        return None
    named = rng.choice(options)
    sign = signs[named.thing.colour]
    return _put("lead", "lead", rng, sign.word, (*named.looks, sign.patches), named.name)


def _travel(kind: str, hops: tuple[int, ...], scene: Scene, rng: Random) -> Turn | None:
    if not scene.stops:
        return None
    stops = {stop.name: stop for stop in scene.stops}
    moves = rng.choices(("left", "right"), k=rng.choice(hops))
    passed: list[Stop] = [rng.choice(scene.stops)]
    for move in moves:
        passed.append(stops[passed[-1].left if move == "left" else passed[-1].right])
    names = [stop.name for stop in passed]
    answer = ", ".join(names[1:]) if kind == "path" else names[-1]
    looks = tuple(stop.patches for stop in passed[:-1])
    return _put(kind, kind, rng, answer, looks, names[0], ", ".join(moves))


_DRAWS: dict[str, tuple[Grain, Draw]] = {
    "background": ("coarse", _background),
    "count": ("coarse", _count),
    "colour": ("coarse", _colour),
    "shape": ("coarse", _shape),
    "list": ("coarse", _list),
    "relation": ("coarse", _relation),
    "letter": ("fine", partial(_mark, "letter", plain_names)),
    "extreme": ("fine", partial(_mark, "extreme", extreme_names)),
    "owner": ("fine", _owner),
    "compare": ("fine", _compare),
    "word": ("fine", _word),
    "after": ("fine", _after),
    "lead": ("fine", _lead),
    "next": ("fine", partial(_travel, "next", (1,))),
    "follow": ("fine", partial(_travel, "follow", (2, 3))),
    "path": ("fine", partial(_travel, "path", (2, 3, 4))),
}
GRAINS: dict[str, Grain] = {kind: grain for kind, (grain, _) in _DRAWS.items()}
KINDS = tuple(GRAINS)


def ask(kind: str, scene: Scene, rng: Random) -> Turn | None:
    """Draw a question of a kind, or none where the scene has nothing to ask about."""
    return _DRAWS[kind][1](scene, rng)


def ask_on(turn: Turn, rng: Random) -> Turn | None:
    """Draw a question that can only be understood after another one, or none if that is about no one thing."""
    thing = turn.about
    if thing is None:
        return None
    options = [("colour", thing.colour, thing.patches), ("shape", thing.shape, thing.patches)]
    if thing.mark:
        options.append((_sort(thing.mark), thing.mark.text, (thing.mark.patch,)))
    sort, answer, look = rng.choice([option for option in options if option[1] != turn.answer])
    kind = "letter" if sort == "digit" else sort
    return Turn(kind, rng.choice(MORE[sort]), answer, (*turn.looks, look), thing)
