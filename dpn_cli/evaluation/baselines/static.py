"""Static pyramids as baselines: the presets of the literature, fitted to a budget by the share that they keep."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Self

from dpn_cli.evaluation.baselines.contender import Fixed, Prompt
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.cost import flops_fraction, tokens_per_layer
from dpn_cli.pyramid.presets import PRESETS
from dpn_cli.pyramid.shape import DecoderShape


@dataclass(frozen=True)
class StaticPyramid(Fixed):
    """One of `PRESETS`, with the share that spends a budget.

    Attributes:
        name: of the preset.
        share: of the visual tokens, kept at every site.
        first_layers: see `Preset`.
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
        return tokens_per_layer(shape, pyramid, self._taken(pyramid, prompt), prompt.grids, text_tokens=0)

    def fraction(self, shape: DecoderShape, prompt: Prompt) -> float:
        """Return the fraction of the original FLOPs that a prompt takes, the choice of tokens included."""
        pyramid = self.pyramid(shape)
        return flops_fraction(shape, pyramid, self._taken(pyramid, prompt), prompt.grids, prompt.text_tokens)

    def _taken(self, pyramid: PyramidConfig, prompt: Prompt) -> tuple[int, ...]:
        """Return the static route, as far as it leaves a sample with fewer tokens."""
        route, stage = [], prompt.grids
        for site, k in enumerate(pyramid.own_routes[0]):
            route.append(k if k in pyramid.offered(site, stage) else 0)
            stage = pyramid.sites[site].experts[route[-1]].left(stage)
        return tuple(route)

    def settings(self, shape: DecoderShape, prompts: Collection[Prompt]) -> list[Self]:
        """Return the shares that are whole tokens of the largest prompt."""
        most = max(prompt.visual_tokens for prompt in prompts)
        return [replace(self, share=count / most) for count in range(1, most)]

    def candidates(self, shape: DecoderShape, prompts: Collection[Prompt], budget: float) -> list[Fixed]:
        """Return it with every number of first layers that can spend so little."""
        ways = [replace(self, first_layers=k) for k in PRESETS[self.name].first_layers] or [self]
        found: list[Fixed] = []
        for way in ways:
            with suppress(ValueError):
                found.append(way.fit(shape, prompts, budget))
        return found or [ways[0].fit(shape, prompts, budget)]

    @contextmanager
    def applied(self, model: PyramidGenerationMixin) -> Iterator[None]:
        """Let a model run as this pyramid for the duration, without its adapter."""
        with model.without_adapter(), model.as_pyramid(self.pyramid(model.text_model.shape)):
            yield
