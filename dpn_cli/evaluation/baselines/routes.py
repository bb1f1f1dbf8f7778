"""The pyramid's own ways beside the baselines: nothing pooled, one route for all, or routed per sample."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from dpn_cli.errors import UsageError
from dpn_cli.evaluation.baselines.baseline import TOLERANCE, Baseline, Fitted, Fixed, Prompt, full_flops, with_images
from dpn_cli.modeling.state import PyramidState
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.cost import Offer, flops_fraction, tokens_per_layer
from dpn_cli.pyramid.route import format_route
from dpn_cli.pyramid.shape import DecoderShape

MOST_TRIED = 5  # routes, where a calibration has measured how much they lose
DEAREST = 0.02  # of a FLOPs fraction: routes that cost so much less than the dearest within a budget are tried, too


@dataclass(frozen=True)
class Original(Fixed):
    """The model as it was: all tokens in every layer."""

    name: ClassVar[str] = "original"

    def layer_tokens(self, shape: DecoderShape, prompt: Prompt) -> list[int]:
        """Return the visual tokens of every layer."""
        return [prompt.visual_tokens] * shape.num_layers

    @contextmanager
    def applied(self, model: PyramidGenerationMixin) -> Iterator[None]:
        """Switch the pyramid and its adapter off for the duration."""
        with model.teacher():
            yield


@dataclass(frozen=True)
class FixedRoute(Fitted):
    """One route for all samples, without an adapter, and without routers unless they gate it.

    Source: paper, table 4 (static pyramids); LLaVolta, https://arxiv.org/abs/2406.20092, pools like this at one depth.

    Attributes:
        pyramid: offers the routes.
        route: Experts, one per site.
    """

    name: ClassVar[str] = "fixed"
    pyramid: PyramidConfig
    route: Route

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.name} {self.experts}"

    @property
    def experts(self) -> str:
        """Its route, by the experts' names."""
        return format_route(self.route, self.pyramid.sites)

    def layer_tokens(self, shape: DecoderShape, prompt: Prompt) -> list[int]:
        """Return the visual tokens of every layer."""
        return tokens_per_layer(shape, self.pyramid, self._taken(prompt), prompt.grids, text_tokens=0)

    def fraction(self, shape: DecoderShape, prompt: Prompt) -> float:
        """Return the fraction of the original FLOPs that a prompt takes, with routers where they gate."""
        static = replace(self.pyramid, static_route=self.route)
        return flops_fraction(shape, static, self._taken(prompt), prompt.grids, prompt.text_tokens)

    def _taken(self, prompt: Prompt) -> Route:
        return self.route if prompt.grids else self.pyramid.full_route

    def settings(self, shape: DecoderShape, prompts: Collection[Prompt]) -> list[Self]:
        """Return the routes that all prompts are offered."""
        offered = [set(self.pyramid.routes_for(grids)) for grids in {prompt.grids for prompt in prompts}]
        routes = [replace(self, route=route) for route in sorted(set.intersection(*offered))]
        return sorted(routes, key=lambda each: each.mean_fraction(shape, prompts))

    def candidates(self, shape: DecoderShape, prompts: Collection[Prompt], budget: float) -> list[Self]:
        """Return the routes within the budget that lose least, as calibration measured them; else the dearest ones."""
        self.fit(shape, prompts, budget)  # refuses what is out of reach
        prompts = with_images(prompts)
        costs = [(each, each.mean_fraction(shape, prompts)) for each in self.settings(shape, prompts)]
        within = [(each, cost) for each, cost in costs if cost <= budget + TOLERANCE]
        if self.pyramid.routes is not None and self.pyramid.mean_losses:
            losses = dict(zip(self.pyramid.routes, self.pyramid.mean_losses, strict=True))
            return sorted((each for each, _ in within), key=lambda each: losses[each.route])[:MOST_TRIED]
        return [each for each, cost in within if cost >= within[-1][1] - DEAREST]

    @contextmanager
    def applied(self, model: PyramidGenerationMixin) -> Iterator[None]:
        """Force the route for the duration."""
        with model.without_adapter(), model.on_route(self.route):
            yield


def walked_by_all(pyramid: PyramidConfig, routes: Sequence[Route], prompts: Sequence[Prompt]) -> list[FixedRoute]:
    """Return routes as baselines.

    Raises:
        UsageError: if a prompt cannot take one of them.
    """
    try:
        for route in routes:
            for grids in dict.fromkeys(prompt.grids for prompt in prompts):
                pyramid.walk(route, grids)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return [FixedRoute(pyramid, route) for route in routes]


@dataclass(frozen=True)
class Routed(Baseline):
    """The pyramid at a budget: calibrated routers, and the adapter where it was healed.

    Attributes:
        budget: mean fraction of the prefill FLOPs, or None for what the model is set to.
    """

    name: ClassVar[str] = "dpn"
    budget: float | None = None

    @contextmanager
    def applied(self, model: PyramidGenerationMixin) -> Iterator[None]:
        """Set the budget for the duration.

        Raises:
            ValueError: if the budget is out of reach.
        """
        with nullcontext() if self.budget is None else model.at_budget(self.budget):
            yield

    def visual_tokens(self, model: PyramidGenerationMixin, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the visual tokens of every layer along the routes of the last prefill."""
        shape = model.text_model.shape
        return [
            tokens_per_layer(shape, model.pyramid, route, prompt.grids, 0)
            for route, prompt in zip(_one_each(model.last_routes, prompts), prompts, strict=True)
        ]

    def fractions(self, model: PyramidGenerationMixin, prompts: Sequence[Prompt]) -> list[float]:
        """Return the FLOPs fractions, routers included."""
        shape = model.text_model.shape
        return [
            flops_fraction(shape, model.pyramid, route, prompt.grids, prompt.text_tokens)
            for route, prompt in zip(_one_each(model.last_routes, prompts), prompts, strict=True)
        ]

    def routes(self, model: PyramidGenerationMixin) -> list[Route]:
        """Return the routes of the last prefill."""
        return model.last_routes


@dataclass(frozen=True)
class GivenRoutes(Routed):
    """The pyramid with its routers at work, so that their time counts, and its routes given.

    Attributes:
        given: one route per sample of the batch.
    """

    given: tuple[Route, ...] = ()

    @contextmanager
    def applied(self, model: PyramidGenerationMixin) -> Iterator[None]:
        """Offer every sample its route alone for the duration: the routers score and decide as ever."""
        text_model = model.text_model

        def reduce(state: PyramidState, site: int) -> PyramidState:
            pairs = zip(text_model.offers(state), self.given, strict=True)
            offers = [_only(offer, route[site]) for offer, route in pairs]
            return text_model.apply(state, site, text_model.choose_among(offers, state, site))

        with model.reduced_by(reduce):
            yield


def _only(offer: Offer, expert: int) -> Offer:
    """Return what leads to one expert of an offer."""
    options, costs = offer
    first = next(i for i, option in enumerate(options) if option.expert == expert)
    return (options[first],), (costs[first],)


def routes_that_spend(
    shape: DecoderShape, pyramid: PyramidConfig, prompts: Sequence[Prompt], budget: float
) -> tuple[Route, ...]:
    """Return a route for every prompt of a batch, so that all of them together spend a budget as nearly as can be.

    One prompt after another takes the route that brings the sum nearest to what is to be spent so far.

    Args:
        shape: Shape of the decoder.
        pyramid: offers the routes.
        prompts: Prompts of the batch, one per sample.
        budget: fraction of their original prefill FLOPs.
    """
    routes: list[Route] = []
    owed = 0.0  # FLOPs that the prompts before have left over
    for prompt in prompts:
        full = full_flops(shape, prompt)
        costs = {
            route: flops_fraction(shape, pyramid, route, prompt.grids, prompt.text_tokens) * full
            for route in pyramid.routes_for(prompt.grids)
        }
        owed += budget * full
        routes.append(min(costs, key=lambda route: abs(costs[route] - owed)))
        owed -= costs[routes[-1]]
    return tuple(routes)


def _one_each(routes: Sequence[Route], prompts: Sequence[Prompt]) -> Sequence[Route]:
    """Return the route of every prompt, where generation with several beams has several rows for each."""
    return routes[:: len(routes) // len(prompts)]
