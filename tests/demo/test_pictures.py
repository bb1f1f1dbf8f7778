"""The generator: deterministic, disjoint, legible, and asking what its pictures answer."""

import subprocess
import sys
from collections import Counter
from itertools import islice
from random import Random

import numpy as np
import pytest

from dpn_cli.demo.drawing import draw
from dpn_cli.demo.pictures import GRAINS, GRID, KINDS, PATCH, SIZE, Sample, Split, samples, scenes
from dpn_cli.demo.questions import ask, ask_on
from dpn_cli.demo.scene import COLOURS, SHAPES, Scene
from tools.teacher.labels import CLASSES, patch_labels

SPLITS: tuple[Split, ...] = ("train", "calibration", "heldout")

FINGERPRINT = """
import hashlib
from dpn_cli.demo.pictures import samples
digest = hashlib.sha256()
for sample in samples("heldout", 32, seed=3):
    digest.update(repr((sample.id, sample.question, sample.answer, sample.looks)).encode() + sample.image.tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def shown() -> list[Scene]:
    """Sixty pictures to train on."""
    return list(islice(scenes("train"), 60))


@pytest.fixture(scope="module")
def asked() -> list[Sample]:
    """Sixty questions of every kind."""
    return list(samples("train", 60 * len(KINDS)))


def test_two_processes_draw_the_same_samples() -> None:
    runs = {
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": s},
        ).stdout
        for s in ("1", "2")
    }
    assert len(runs) == 1


def test_no_picture_is_in_two_splits() -> None:
    pixels = {split: {draw(scene).tobytes() for scene in islice(scenes(split), 40)} for split in SPLITS}
    assert sum(map(len, pixels.values())) == len(set().union(*pixels.values())) == 120


def test_every_stream_keeps_to_the_split_that_owns_the_content() -> None:
    for split in SPLITS:
        assert {scene.split for seed in range(3) for scene in islice(scenes(split, seed), 25)} == {split}


def test_seeds_name_different_streams() -> None:
    first, second = (next(scenes("train", seed)).number for seed in (0, 1))
    assert first != second


def test_kinds_are_evenly_mixed() -> None:
    counts = Counter(sample.kind for sample in samples("calibration", 3 * len(KINDS)))
    assert counts == dict.fromkeys(KINDS, 3)


def test_answers_are_not_given_away_by_the_kind(asked: list[Sample]) -> None:
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for sample in asked:
        by_kind[sample.kind][sample.answer] += 1
    for kind, counts in by_kind.items():
        assert counts.most_common(1)[0][1] < 0.45 * counts.total(), kind


def test_every_kind_is_put_in_many_ways(asked: list[Sample]) -> None:
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for sample in asked:
        found[sample.kind].add(sample.question)
    assert min(map(len, found.values())) >= 12


@pytest.mark.parametrize("seed", range(3))
def test_questions_of_a_picture_have_one_answer_each(seed: int) -> None:
    rng = Random(seed)
    for scene in islice(scenes("train", seed), 50):
        known: dict[str, str] = {}
        for kind in KINDS * 3:
            turn = ask(kind, scene, rng)
            if turn:
                assert known.setdefault(turn.question, turn.answer) == turn.answer


def test_the_picture_shows_the_answer_where_the_last_look_is(shown: list[Scene]) -> None:
    glyphs = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    rng = Random(0)
    for scene in shown[:40]:
        labels = patch_labels(scene)[list(CLASSES).index("glyph")].reshape(GRID, GRID)
        for kind in ("letter", "extreme", "after", "word", "lead"):
            turn = ask(kind, scene, rng)
            if turn:
                assert turn.looks[-1]
                assert {glyphs[labels[patch] - 1] for patch in turn.looks[-1]} == set(turn.answer)


def test_writing_is_dark_on_pale_or_pale_on_dark(shown: list[Scene]) -> None:
    for scene in shown[:20]:
        pixels = draw(scene).astype(int).mean(-1)
        assert pixels.shape == (SIZE, SIZE)
        for sign in scene.signs:
            row, column = (PATCH * each + shift for each, shift in zip(sign.patch, scene.shift, strict=True))
            plate = pixels[row:, column:][: PATCH * sign.scale, : PATCH * sign.scale]
            assert np.quantile(plate, 0.95) - np.quantile(plate, 0.05) > 60


def test_fine_questions_say_where_to_look() -> None:
    for sample in samples("heldout", 6 * len(KINDS)):
        patches = [patch for look in sample.looks for patch in look]
        assert all(0 <= row < GRID and 0 <= column < GRID for row, column in patches)
        assert patches or GRAINS[sample.kind] == "coarse"


def test_travelling_follows_the_plates(shown: list[Scene]) -> None:
    rng, moves = Random(1), {"left": 0, "right": 2}
    for scene in shown:
        turn = ask("follow", scene, rng)
        if turn:
            around = {stop.name: (stop.left, stop.name, stop.right) for stop in scene.stops}
            words = turn.question.replace(",", "").replace(":", "").replace(".", "").split()
            here = next(word for word in words if word in around)
            for move in (word for word in words if word in moves):
                here = around[here][moves[move]]
            assert here == turn.answer


def test_asking_on_is_about_the_same_thing(shown: list[Scene]) -> None:
    rng, found = Random(2), 0
    for scene in shown:
        turn = ask("extreme", scene, rng)
        more = ask_on(turn, rng) if turn else None
        if turn and more:
            found += 1
            assert turn.about is not None and turn.about.mark is not None
            assert more.answer in (turn.about.colour, turn.about.shape)
    assert found > 20


def test_pictures_are_crowded() -> None:
    many = list(islice(scenes("heldout"), 200))
    assert max(len(scene.things) for scene in many) >= 11
    assert np.mean([len(scene.things) for scene in many]) > 6
    assert sum(map(_overlap, many)) > 150


def _overlap(scene: Scene) -> bool:
    return any(
        np.hypot(*np.subtract(one.centre, two.centre)) < one.radius + two.radius
        for index, one in enumerate(scene.things)
        for two in scene.things[:index]
    )


def test_labels_name_what_is_there(shown: list[Scene]) -> None:
    for scene in shown[:20]:
        labels = dict(zip(CLASSES, patch_labels(scene), strict=True))
        assert all((labels[name] < size).all() for name, size in CLASSES.items())
        shapes = {SHAPES[index - 1] for index in labels["shape"] if index}
        colours = {list(COLOURS)[index] for index in labels["colour"]}
        assert shapes <= {thing.shape for thing in scene.things}
        assert colours <= {scene.ground.colour, *(each.colour for each in (*scene.things, *scene.signs))}
