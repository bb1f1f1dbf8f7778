"""What a teacher is taught: pictures, questions about them, and what the patches of a picture show."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from dpn_cli.demo.questions import Grain, Turn
from dpn_cli.demo.scene import Split


@dataclass(frozen=True)
class Subject:
    """Pictures, the questions about them, and the untrained teacher that fits them.

    Attributes:
        grid: Vision patches along a side of a picture.
        grains: The grain of every kind of question, by kind.
        weights: How often each kind is asked in training.
        classes: Number of classes of every dense label, by its name.
        written: Name of the dense label that is not 0 where something is written.
        after_projector: Whether dense labels are read after the projector, which then keeps what they tell, or before.
        text: Tokens of a training conversation after the picture.
        answers: Places for answer tokens per picture, the mean over a batch.
        scenes: Yields scenes of a split without end, by a seed.
        draw: Draws a scene as RGB bytes, shape (size, size, 3).
        labels: Labels the patches of a scene, shape (classes, patches).
        ask: Draws a question of a kind about a scene, or none where there is nothing to ask about.
        ask_on: Draws a question that can only be understood after another one, or none; None: there
            are no such questions.
        card: Folder of the card's text: ``card.md`` with places for figures, ``story.md``.
        build_processor: Builds the processor.
        build_model: Builds the untrained model for a tokenizer.
    """

    grid: int
    grains: Mapping[str, Grain]
    weights: Mapping[str, float]
    classes: Mapping[str, int]
    written: str
    after_projector: bool
    text: int
    answers: int
    scenes: Callable[[Split, int], Iterator[Any]]
    draw: Callable[[Any], NDArray[np.uint8]]
    labels: Callable[[Any], NDArray[np.uint8]]
    ask: Callable[[str, Any, Random], Turn | None]
    ask_on: Callable[[Turn, Random], Turn | None] | None
    card: Path
    build_processor: Callable[[], LlavaProcessor]
    build_model: Callable[[PreTrainedTokenizerFast], LlavaForConditionalGeneration]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of question, in the order of their numbers."""
        return tuple(self.grains)
