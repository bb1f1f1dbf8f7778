"""Greedy answers to many questions."""

from collections.abc import Callable
from pathlib import Path

from dpn_cli.data.samples import Sample, Turn
from dpn_cli.inference.generation import greedy_answers
from dpn_cli.inference.loading import load_model, load_processor


def test_answers_are_greedy_whatever_the_generation_config_asks_for(
    make_converted: Callable[..., Path], picture: Path
) -> None:
    folder = make_converted()
    model, processor = load_model(folder), load_processor(folder)
    samples = [Sample("x", (picture,), (Turn("what colour ?"),))]
    expected = greedy_answers(model, processor, samples, 1, 8)
    model.generation_config.num_beams = 3
    model.generation_config.return_dict_in_generate = True
    assert greedy_answers(model, processor, samples, 1, 8) == expected != [""]
