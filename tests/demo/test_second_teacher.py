"""The second teacher, for benchmarks: its pictures, its labels, and that what its script builds can be converted."""

import json
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from dpn_cli.conversion.convert import convert
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.demo.scene import Split
from dpn_cli.inference.loading import load_model, load_processor
from tools.second_teacher.data import write_data
from tools.second_teacher.labels import CLASSES, patch_labels
from tools.second_teacher.scene import GRID, LETTERS, PATCH, SIZE, posters
from tools.second_teacher.subject import SECOND
from tools.teacher.batches import Packer, Stream, conversation
from tools.teacher.trainer import Trainer

SPLITS: tuple[Split, ...] = ("train", "calibration", "heldout")


def test_splits_share_no_poster_and_a_seed_gives_the_same_ones() -> None:
    numbers = {split: {poster.number for poster in islice(posters(split, 0), 50)} for split in SPLITS}
    assert len(set.union(*numbers.values())) == 150
    assert numbers["train"] == {poster.number for poster in islice(posters("train", 0), 50)}


def test_what_is_asked_about_is_written_where_it_says() -> None:
    letters, rng, asked = list(CLASSES).index("letter"), Random(0), set()
    for poster in islice(posters("heldout", 1), 60):
        written = patch_labels(poster)[letters].reshape(GRID, GRID)
        for turn in conversation(SECOND, poster, rng):
            asked.add(turn.kind)
            if turn.kind in ("word", "corner", "badge"):
                assert "".join(LETTERS[written[patch] - 1] for patch in turn.looks[-1]) == turn.answer
    assert asked == set(SECOND.kinds)


def test_letters_are_drawn_where_they_are_labelled() -> None:
    poster = next(poster for poster in posters("heldout", 2) if poster.corners and not poster.noisy)
    pixels = SECOND.draw(poster)
    assert pixels.shape == (SIZE, SIZE, 3)
    patches = pixels.reshape(GRID, PATCH, GRID, PATCH, 3).astype(int)
    contrast = np.ptp(patches.sum(-1), axis=(1, 3))
    written = patch_labels(poster)[list(CLASSES).index("letter")].reshape(GRID, GRID) > 0
    assert contrast[written].min() > 200


def test_data_are_read_as_they_were_asked(tmp_path: Path) -> None:
    file = write_data(tmp_path / "data", "calibration", 16, seed=0)
    found = load_data(DataOptions(str(file))).samples
    assert [sample.kind for sample in found] == 2 * list(SECOND.kinds)
    rows = json.loads(file.read_text())
    assert [(row["question"], row["answer"]) for row in rows] == [
        (turn.question, turn.answer) for sample in found for turn in sample.turns
    ]


@pytest.fixture(scope="module")
def packer() -> Packer:
    return Packer(SECOND, SECOND.build_processor().tokenizer)


@pytest.mark.slow
def test_training_learns_and_the_checkpoint_converts(packer: Packer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    processor = SECOND.build_processor()
    model = SECOND.build_model(processor.tokenizer)
    trainer = Trainer(model, packer, rate=2e-3, compiled=False)
    losses = []
    for batch in islice(Stream(packer, 2, seed=0), 8):
        trainer.step(batch, done=0.1)
        losses.append(trainer.report()["dense"])
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "second")
    processor.save_pretrained(tmp_path / "second")
    converted = convert(str(tmp_path / "second"), output=tmp_path / "second-dpn").output
    loaded, processor = load_model(converted), load_processor(converted)
    inputs = processor(text="USER: <image>\nCount the stars. ASSISTANT:", images=SECOND.draw(next(posters("train", 0))))
    assert inputs["input_ids"][0].count(processor.image_token_id) == GRID**2
    assert loaded.config.vision_config.model_type == "siglip_vision_model"
    assert loaded.config.text_config.model_type == "qwen2"
