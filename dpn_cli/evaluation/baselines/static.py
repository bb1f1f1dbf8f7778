"""Static pyramids as baselines: the presets of the literature, fitted to a budget by the share that they keep."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Self

from dpn_cli.evaluation.baselines.baseline import Fitted, Prompt
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.cost import flops_fraction, tokens_per_layer
from dpn_cli.pyramid.presets import PRESETS
from dpn_cli.pyramid.shape import DecoderShape


@dataclass(frozen=True)
class StaticPyramid(Fitted):
    """One of `PRESETS`, with the share that spends a budget.

    Attributes:
        name: Name of the preset.
        share: Fraction of the visual tokens that every site keeps.
        first_layers: Layers after which its sites stand, as in `Preset`.
    """

    name: str  # type: ignore[misc]  # the others have one name a class
    share: float = 1.0
    first_layers: int | None = None

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name if self.first_layers is None else f"{self.name} K={self.first_layers}"

    def pyramid(self, shape: DecoderShape) -> PyramidConfig:
        """Return it for a decoder."""
        return PRESETS[self.name].pyramid(self.share, shape.num_layers, self.first_layers)

    def layer_tokens(self, shape: DecoderShape, prompt: Prompt) -> list[int]:
        """Return the visual tokens of every layer."""
        pyramid = self.pyramid(shape)
        return tokens_per_layer(shape, pyramid, pyramid.own_routes[0], prompt.grids, text_tokens=0)

    def fraction(self, shape: DecoderShape, prompt: Prompt) -> float:
        """Return the fraction of the original FLOPs that a prompt takes, the choice of tokens included."""
        pyramid = self.pyramid(shape)
        return flops_fraction(shape, pyramid, pyramid.own_routes[0], prompt.grids, prompt.text_tokens)

    def settings(self, shape: DecoderShape, prompts: Collection[Prompt]) -> list[Self]:
        """Return the shares that are whole tokens of the largest prompt, if every site drops some of the smallest."""
        by_size = sorted(prompts, key=lambda prompt: prompt.visual_tokens)
        smallest, most = by_size[0].grids, by_size[-1].visual_tokens
        shares = [replace(self, share=count / most) for count in range(1, most)]
        pyramids = [share.pyramid(shape) for share in shares]
        pairs = zip(shares, pyramids, strict=True)
        return [share for share, pyramid in pairs if pyramid.can_walk(pyramid.own_routes[0], smallest)]

    def candidates(self, shape: DecoderShape, prompts: Collection[Prompt], budget: float) -> list[Self]:
        """Return it with every number of first layers that can spend so little."""
        depths = [k for k in PRESETS[self.name].first_layers if k < shape.num_layers]
        ways = [replace(self, first_layers=k) for k in depths] or [self]
        found: list[Self] = []
        for way in ways:
            with suppress(ValueError):
                found.append(way.fit(shape, prompts, budget))
        return found or [ways[0].fit(shape, prompts, budget)]

    @contextmanager
    def applied(self, model: PyramidGenerationMixin) -> Iterator[None]:
        """Let a model run as this pyramid for the duration, without its adapter."""
        pyramid = replace(self.pyramid(model.text_model.shape), prepooling=model.pyramid.prepooling)
        with model.without_adapter(), model.as_pyramid(pyramid):
            yield
