"""Decisions: what happens at a site. Every sample gets an expert, which leaves it with fewer visual tokens.

Shapes: B batch, S current sequence, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from dpn_cli.modeling.call import current_call
from dpn_cli.modeling.engine import compact
from dpn_cli.modeling.experts.registry import assign
from dpn_cli.modeling.routers import GATE_TEMPERATURE, Readable, decide, router_features, trusted
from dpn_cli.modeling.state import Choice, PyramidState, put
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.cost import Offer, offer
from dpn_cli.pyramid.experts import KEEP, KINDS, Kind
from dpn_cli.pyramid.shape import DecoderShape


class DecisionsMixin:
    """Lets a text model decide at the sites of its pyramid."""

    own_pyramid: PyramidConfig
    default_routes: tuple[Route, ...]
    shape: DecoderShape
    routers: nn.ModuleList
    poolers: nn.ModuleList

    @property
    def pyramid(self) -> PyramidConfig:
        """The pyramid that the model runs as: its own, but for the duration of `as_pyramid`."""
        return current_call(self).pyramid or self.own_pyramid

    @pyramid.setter
    def pyramid(self, pyramid: PyramidConfig) -> None:
        self.own_pyramid = pyramid

    @property
    def trade_off(self) -> float:
        """The λ that routers choose with."""
        chosen = current_call(self).trade_off
        return self.pyramid.trade_off if chosen is None else chosen

    @property
    def forced_routes(self) -> tuple[Route, ...]:
        """The route of all samples, or one for each; empty where the routers choose."""
        chosen = current_call(self).routes
        return self.default_routes if chosen is None else chosen

    @property
    def reads_instruction(self) -> bool:
        """Whether a prefill has to know where the instruction ends: for its routers, or for an expert."""
        return self.asks_routers or any(kind.reads_instruction for kind in self._kinds())

    @property
    def reads_salience(self) -> bool:
        """Whether an expert looks at what the vision tower attends to."""
        return any(kind.reads_salience for kind in self._kinds())

    def _kinds(self) -> Iterator[Kind]:
        """Yield the kinds of the experts that a prefill may take."""
        sites = self.pyramid.sites if current_call(self).pools else ()
        return (KINDS[expert.kind] for site in sites for expert in site.experts)

    @property
    def asks_routers(self) -> bool:
        """Whether a prefill asks the routers: to choose experts, or for the gate of those that are forced."""
        chooses = not self.forced_routes or self.pyramid.gate != "none"
        return current_call(self).pools and self.pyramid.has_routers and chooses

    def reduce(self, state: PyramidState, site: int) -> PyramidState:
        """Leave a batch with fewer visual tokens at a site: every sample by the expert that is chosen for it."""
        return self.apply(state, site, self.choose(state, site))

    def router_features(self, state: PyramidState) -> torch.Tensor:
        """Return what a router reads in this state, [B, num_inputs, D]."""
        assert state.router_tokens is not None and state.coords is not None
        is_visual = state.coords[..., 0] >= 0
        columns = state.now_at(state.router_tokens.clamp(min=0))
        is_read = torch.zeros_like(is_visual, dtype=torch.long).scatter_add(
            1, columns, (state.router_tokens >= 0).long()
        )
        batch = Readable(state.hidden_states, is_read > 0, state.is_text, is_visual)
        return router_features(batch, self.pyramid.router)

    def choose(self, state: PyramidState, site: int) -> Choice:
        """Let the forced route or the router pick every sample's expert at a site."""
        if self.forced_routes:
            return self.take(state, site, self._forced(self.forced_routes, state, site))
        offers = self.offers(state)
        if all(len(options) == 1 for options, _ in offers):
            return self.take(state, site, [options[0].expert for options, _ in offers])
        return self.choose_among(offers, state, site)

    def choose_among(self, offers: Sequence[Offer], state: PyramidState, site: int) -> Choice:
        """Let the router pick every sample's expert among some options; see `offers`."""
        logits = self.routers[site](self.router_features(state))
        scores = trusted(logits, self.pyramid.mean_losses, self.pyramid.trust(self.trade_off))
        experts = [
            decide(row, options, costs, self.trade_off)
            for row, (options, costs) in zip(scores.tolist(), offers, strict=True)
        ]
        return Choice(experts, self._gate(state, logits, experts))

    def take(self, state: PyramidState, site: int, experts: list[int]) -> Choice:
        """Take given experts, gated as if the router had picked them."""
        if self.pyramid.gate == "none":
            return Choice(experts)
        return Choice(experts, self._gate(state, self.routers[site](self.router_features(state)), experts))

    def _forced(self, routes: Sequence[Route], state: PyramidState, site: int) -> list[int]:
        """Return what forced routes take at a site, 1×1 where a sample is not pooled at all."""
        spread = _spread(routes, len(state.grids))
        for route, grids in set(zip(spread, state.image_grids, strict=True)):
            self.pyramid.walk(route, grids)
        return [
            route[site] if grids and self.pyramid.takes(grids) else 0
            for route, grids in zip(spread, state.grids, strict=True)
        ]

    def _gate(self, state: PyramidState, logits: torch.Tensor, experts: list[int]) -> torch.Tensor | None:
        """Return the probability gate [B] of the chosen experts (paper, eq. 4), or None without a gate."""
        if self.pyramid.gate == "none":
            return None
        index = put(experts, logits.device)[:, None]
        probability = (logits / GATE_TEMPERATURE).softmax(-1).gather(1, index)[:, 0]
        return torch.where(self._taken(state).to(probability.device), probability, 1)

    def _taken(self, state: PyramidState) -> torch.Tensor:
        """Say which samples are pooled at all, [B] bool."""
        return put([self.pyramid.takes(grids) for grids in state.grids], state.hidden_states.device)

    def offers(self, state: PyramidState) -> list[Offer]:
        """Return, per sample, the options at the next site and the FLOPs fraction of each."""
        samples = zip(state.grids, state.image_grids, state.text_tokens, state.routes, strict=True)
        return [
            offer(self.shape, self.pyramid, route, image if grids else (), text)
            for grids, image, text, route in samples
        ]

    def apply(self, state: PyramidState, site: int, choice: Choice) -> PyramidState:
        """Leave every sample with fewer visual tokens, by its own expert."""
        pyramid = self.pyramid
        routes = tuple((*route, k) for route, k in zip(state.routes, choice.experts, strict=True))
        experts = [pyramid.sites[site].experts[k] for k in choice.experts]
        untouched = set(experts) == {KEEP} and pyramid.pooling != "conv"
        if untouched and choice.probability is None:
            return replace(state, routes=routes)
        assignment = assign(self, state, experts, pyramid.sites[site].after_layer + 1)
        is_sized = pyramid.attention == "sized"
        if pyramid.pooling == "conv":
            reduced = compact(state, assignment, weights=self._conv_weights(state, site, choice), sized=is_sized)
        else:
            reduced = compact(state, assignment, pyramid.pooling, sized=is_sized)
        assert reduced.coords is not None
        hidden_states = reduced.hidden_states
        if choice.probability is not None:
            probability = choice.probability.to(hidden_states.device)
            gate = torch.where(reduced.coords[..., 0] >= 0, probability[:, None], 1)
            hidden_states = hidden_states * gate[..., None].to(hidden_states.dtype)
        each = list(zip(experts, state.grids, state.coord_grids, strict=True))
        return replace(
            reduced,
            hidden_states=hidden_states,
            grids=tuple(expert.left(grids, pyramid.rounding) for expert, grids, _ in each),
            coord_grids=tuple(
                coords if expert.share else expert.left(coords, pyramid.rounding) for expert, _, coords in each
            ),
            routes=routes,
        )

    def _conv_weights(self, state: PyramidState, site: int, choice: Choice) -> torch.Tensor:
        """Return every token's factors [B, S, D] in the depthwise convolution of its sample's expert.

        They are relative to the mean of a complete cell; an incomplete one has fewer tokens, so each counts for more.
        """
        assert state.coords is not None
        rows = []
        for coords, k, taken in zip(state.coords, choice.experts, self._taken(state), strict=True):
            kernel = self.poolers[site](k).float()  # [D, kernel_h, kernel_w]
            kernel = kernel * kernel[0].numel()
            factors = kernel[:, coords[:, 1] % kernel.shape[1], coords[:, 2] % kernel.shape[2]].T  # [S, D]
            rows.append(torch.where((coords[:, :1] >= 0) & taken, factors, 1))
        return torch.stack(rows)


def _spread(routes: Sequence[Route], batch: int) -> list[Route]:
    """Give every sample its route; several rows per route where generation has expanded the batch."""
    if batch % len(routes):
        raise ValueError(f"{len(routes)} routes were set, the batch has {batch} samples: give one, or one per sample")
    return [route for route in routes for _ in range(batch // len(routes))]
