"""The interface of all baselines.

Every baseline spends a wanted fraction of the original LLM's prefill FLOPs, counted by the same formula as a
pyramid's: what a static pyramid computes to choose tokens is charged, as it is to every expert (`Expert.flops`). What
goes on before the language model is not charged to anyone: the vision tower, and what salience and the coarser grids
add to it or save there.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Self

from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import Route
from dpn_cli.pyramid.experts import Grid, num_tokens
from dpn_cli.pyramid.shape import DecoderShape

TOLERANCE = 0.01  # of a FLOPs fraction: what differs by more is not equal


@dataclass(frozen=True)
class Prompt:
    """What the cost of a prefill depends on.

    Attributes:
        grids: the visual tokens of every image, (H, W).
        text_tokens: Number of tokens that are not visual.
    """

    grids: tuple[Grid, ...]
    text_tokens: int

    @property
    def visual_tokens(self) -> int:
        """Before any reduction."""
        return num_tokens(self.grids)


class Baseline(ABC):
    """A way to answer with fewer visual tokens, or with all of them."""

    name: ClassVar[str]

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name

    @abstractmethod
    def applied(self, model: PyramidGenerationMixin) -> AbstractContextManager[None]:
        """Let a model run this way for the duration, `generate` included.

        Raises:
            UsageError: if the model is of a kind that this baseline cannot handle.
        """

    @abstractmethod
    def visual_tokens(self, model: PyramidGenerationMixin, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the visual tokens of every layer in the last prefill, whose batch the prompts were."""

    def routes(self, model: PyramidGenerationMixin) -> list[Route] | None:
        """Return the routes of the last prefill, or None if this baseline has none."""
        return None

    @abstractmethod
    def fractions(self, model: PyramidGenerationMixin, prompts: Sequence[Prompt]) -> list[float]:
        """Return the fraction of the original FLOPs that every prompt took in the last prefill."""


class Fixed(Baseline):
    """A baseline that treats all prompts of one size alike, whatever they ask."""

    @abstractmethod
    def layer_tokens(self, shape: DecoderShape, prompt: Prompt) -> list[int]:
        """Return the visual tokens of every layer."""

    def visual_tokens(self, model: PyramidGenerationMixin, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the visual tokens of every layer for every prompt."""
        shape = model.text_model.shape
        return [self.layer_tokens(shape, prompt) for prompt in prompts]

    def fractions(self, model: PyramidGenerationMixin, prompts: Sequence[Prompt]) -> list[float]:
        """Return the fraction of the original FLOPs that every prompt takes."""
        shape = model.text_model.shape
        return [self.fraction(shape, prompt) for prompt in prompts]

    def fraction(self, shape: DecoderShape, prompt: Prompt) -> float:
        """Return the fraction of the original FLOPs that a prompt takes."""
        spent = sum(shape.layer_flops(count + prompt.text_tokens) for count in self.layer_tokens(shape, prompt))
        return spent / full_flops(shape, prompt)


class Fitted(Fixed):
    """A baseline whose settings decide what it spends."""

    @abstractmethod
    def settings(self, shape: DecoderShape, prompts: Collection[Prompt]) -> Sequence[Self]:
        """Return this baseline in all its settings, by rising cost."""

    def mean_fraction(self, shape: DecoderShape, prompts: Collection[Prompt]) -> float:
        """Return the mean FLOPs fraction over prompts, see `fit`."""
        counts = Counter(prompts)
        total = sum(self.fraction(shape, prompt) * count for prompt, count in counts.items())
        return total / counts.total()

    def fit(self, shape: DecoderShape, prompts: Collection[Prompt], budget: float) -> Self:
        """Return the setting whose mean FLOPs are closest to a budget.

        Args:
            shape: Shape of the decoder.
            prompts: those to be answered; ones without an image have no say. A mapping says how much each counts.
            budget: mean fraction of the original prefill FLOPs.

        Raises:
            ValueError: if the budget is out of its reach.
        """
        prompts = with_images(prompts)
        settings = self.settings(shape, prompts)

        def spends(setting: Self) -> float:
            return setting.mean_fraction(shape, prompts)

        if spends(settings[0]) > budget + TOLERANCE:
            raise ValueError(f"{self.name} cannot spend less than {spends(settings[0]):.3f} of the prefill FLOPs")
        above = bisect_left(settings, budget, key=spends)
        return min(settings[max(above - 1, 0) : above + 1], key=lambda setting: abs(spends(setting) - budget))

    def candidates(self, shape: DecoderShape, prompts: Collection[Prompt], budget: float) -> Sequence[Self]:
        """Return the settings that are to be tried at a budget, where the best one is to be judged; see `fit`."""
        return [self.fit(shape, prompts, budget)]


def with_images(prompts: Collection[Prompt]) -> dict[Prompt, float]:
    """Return the prompts that have an image, and how much each counts: see `Fitted.fit`."""
    return {prompt: count for prompt, count in Counter(prompts).items() if prompt.grids}


def full_flops(shape: DecoderShape, prompt: Prompt) -> int:
    """Return the FLOPs of a prompt's original prefill."""
    return shape.num_layers * shape.layer_flops(prompt.visual_tokens + prompt.text_tokens)


def unequal(label: str, spent: float, dpn: float) -> str | None:
    """Say that a baseline does not spend what the pyramid does; None where it does."""
    if abs(spent - dpn) <= TOLERANCE:
        return None
    return f"{label} spends {spent:.3f} of the prefill FLOPs, dpn {dpn:.3f}"
