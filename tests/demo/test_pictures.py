"""The generator: deterministic, disjoint, and asking what its pictures answer."""

import subprocess
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from dpn_cli.demo.pictures import GRID, KINDS, PATCH, SIZE, Split, answers, samples, scenes
from tools.teacher.labels import CLASSES, patch_labels

SPLITS: tuple[Split, ...] = ("train", "calibration", "heldout")

FINGERPRINT = """
import hashlib
from dpn_cli.demo.pictures import samples
digest = hashlib.sha256()
for sample in samples("heldout", 20, seed=3):
    digest.update(repr((sample.id, sample.question, sample.answer)).encode() + sample.image.tobytes())
print(digest.hexdigest())
"""


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
    pixels = {split: {scene.draw().tobytes() for scene in islice(scenes(split), 300)} for split in SPLITS}
    assert sum(map(len, pixels.values())) == len(set().union(*pixels.values()))


def test_every_stream_keeps_to_the_split_that_owns_the_content() -> None:
    for split in SPLITS:
        assert {scene.split for seed in range(3) for scene in islice(scenes(split, seed), 50)} == {split}


def test_seeds_name_different_streams() -> None:
    first, second = (next(scenes("train", seed)).digest for seed in (0, 1))
    assert first != second


def test_kinds_are_evenly_mixed() -> None:
    counts = Counter(sample.kind for sample in samples("calibration", 5 * len(KINDS)))
    assert counts == dict.fromkeys(KINDS, 5)


def test_answers_are_not_given_away_by_the_kind() -> None:
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for sample in samples("train", 100 * len(KINDS)):
        by_kind[sample.kind][sample.answer] += 1
    for kind, counts in by_kind.items():
        assert counts.most_common(1)[0][1] < 45, kind


def test_every_answer_is_a_known_word() -> None:
    assert {sample.answer for sample in samples("train", 40 * len(KINDS))} <= set(answers())


@pytest.mark.parametrize("seed", range(3))
def test_questions_of_a_picture_have_one_answer_each(seed: int) -> None:
    for scene in islice(scenes("train", seed), 50):
        known: dict[str, str] = {}
        for turn in scene.turns(np.random.default_rng(seed)):
            assert known.setdefault(turn.question, turn.answer) == turn.answer


def test_labels_mark_the_patches_that_carry_plates() -> None:
    glyphs = list(CLASSES).index("glyph")
    for scene in islice(scenes("train"), 20):
        pixels = np.asarray(scene.draw(), dtype=int)
        assert pixels.shape == (SIZE, SIZE, 3)
        labelled = patch_labels(scene)[glyphs].reshape(GRID, GRID)
        plates = {patch for thing in scene.things for patch in thing.mark.patches}
        assert {(int(r), int(c)) for r, c in np.argwhere(labelled)} == plates
        for row, column in plates:
            patch = pixels[row * PATCH :, column * PATCH :][:PATCH, :PATCH].mean(-1)
            assert (patch < 40).sum() >= 7 and (patch > 120).sum() >= 30
