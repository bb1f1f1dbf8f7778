"""What routers decide over a measured route tree, and what that costs: exact sums, no sampling.

Shapes: N samples, R routes, P prefixes, E scores of a router, C options at a prefix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from dpn_cli.calibration.rollout import RouteTable, RouteTree
from dpn_cli.inference.threads import threads_for
from dpn_cli.modeling.routers import trusted
from dpn_cli.pyramid.config import PyramidConfig, Route

SAMPLES = 64  # whose features are in memory together


@dataclass(frozen=True)
class Policy:
    """Routers' scores over a table, and the rule that decides by them: `decide` of modeling/routers.py, in tensors.

    Attributes:
        table: Measurements of every route on every sample.
        logits: [N, P, E] scores of every site's router at every prefix, one per route where the pyramid lists them,
            else one per expert of the site; -inf where there is no such score. [M, N, P, E] where members are asked.
    """

    table: RouteTable
    logits: torch.Tensor

    @classmethod
    def of(cls, routers: nn.ModuleList, table: RouteTable) -> "Policy":
        """Ask the routers at every prefix of every sample, some samples at a time, on the device that they are on."""
        device, some = next(routers.parameters()).device, torch.arange(len(table.distortion)).split(SAMPLES)
        with threads_for(table.hidden_size):
            asked = [_ask(routers, table.tree, table.features[rows].to(device)).cpu() for rows in some]
        return cls(table, torch.cat(asked, dim=-3))

    @cached_property
    def _options(self) -> list[list[tuple[int, int, int]]]:
        """What can be chosen at every prefix: (score, the route that it costs, the expert)."""
        routes = {route: i for i, route in enumerate(self.table.tree.routes)}
        num_sites = len(self.table.tree.routes[0])
        options = []
        for prefix in self.table.tree.prefixes:
            site = len(prefix)
            below = [(i, route[site]) for route, i in routes.items() if route[:site] == prefix]
            if self.table.tree.is_listed:
                options.append([(i, i, expert) for i, expert in below])
            else:  # an expert costs what it does with all tokens kept ever after
                rest = (0,) * (num_sites - site - 1)
                experts = sorted({expert for _, expert in below})
                options.append([(k, routes[(*prefix, k, *rest)], k) for k in experts if (*prefix, k, *rest) in routes])
        return options

    def _padded(self, part: int) -> torch.Tensor:
        """Return one part of the options as [P, C], -1 where a prefix has fewer."""
        most = max(map(len, self._options))
        return torch.tensor([[*(o[part] for o in row), *[-1] * (most - len(row))] for row in self._options])

    @cached_property
    def _score(self) -> torch.Tensor:
        return self._padded(0)

    @cached_property
    def _route(self) -> torch.Tensor:
        return self._padded(1)

    @cached_property
    def _expert(self) -> torch.Tensor:
        return self._padded(2)

    @cached_property
    def _next(self) -> torch.Tensor:
        """The prefix that an option leads to, [P, C]; at the last site the route instead."""
        prefixes = {prefix: i for i, prefix in enumerate(self.table.tree.prefixes)}
        routes = {route: i for i, route in enumerate(self.table.tree.routes)}
        rows = [
            [prefixes.get((*prefix, k), routes.get((*prefix, k), 0)) for k in experts]
            for prefix, experts in zip(self.table.tree.prefixes, self._expert.tolist(), strict=True)
        ]
        return torch.tensor(rows)

    def chooser(self, trust: float = 1.0, mean_losses: Sequence[float] = ()) -> Callable[[float], torch.Tensor]:
        """Return `choose(trade_off) -> [N]`, the index of the route that every sample takes at λ; see `trusted`."""
        route, following, rows = self._route.clamp(min=0), self._next, torch.arange(len(self.logits))
        allowed = (self._route >= 0) & self.table.offered[:, route]
        allowed |= (self._route >= 0) & ~allowed.any(-1, keepdim=True)  # a prefix out of this sample's reach: any
        scores = trusted(self.logits, mean_losses, trust).gather(2, self._score.clamp(min=0).expand_as(allowed))
        scores, cost = scores.masked_fill(~allowed, -torch.inf), self.table.fraction[:, route]  # [N, P, C]

        def choose(trade_off: float) -> torch.Tensor:
            node = torch.zeros_like(rows)
            for _ in self.table.tree.routes[0]:
                best = (scores[rows, node] - trade_off * cost[rows, node]).argmax(-1)  # ties go to the first
                node = following[node, best]
            return node

        return choose

    def choose(self, trade_off: float, trust: float = 1.0, mean_losses: Sequence[float] = ()) -> torch.Tensor:
        """Return the index of the route that every sample takes at λ, [N]; see `trusted` for the rest."""
        return self.chooser(trust, mean_losses)(trade_off)

    def choose_as(self, pyramid: PyramidConfig, trade_off: float) -> torch.Tensor:
        """Return what a calibrated pyramid lets every sample take at λ, [N]."""
        return self.choose(trade_off, pyramid.trust(trade_off), pyramid.mean_losses)

    def predictions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return predicted and measured losses of all reduced routes, flat: at every prefix where they are.

        Where members were asked, what each predicts, [M, ...].
        """
        reduced = self.table.measured.clone()
        reduced[:, 0] = False
        if not self.table.tree.is_listed:  # what its experts add
            prefixes = {prefix: i for i, prefix in enumerate(self.table.tree.prefixes)}
            paths = [[prefixes[route[:site]] for site in range(len(route))] for route in self.table.tree.routes]
            added = -self.logits[..., torch.tensor(paths), torch.tensor(self.table.tree.routes)].sum(-1)
            return added[..., reduced], self.table.distortion[reduced]
        below = (self._score[..., None] == torch.arange(len(self.table.tree.routes))).any(1)  # [P, R]
        counted = below[None] & reduced[:, None]
        predicted = -self.logits[..., : below.shape[1]]
        return predicted[..., counted], self.table.distortion[:, None].expand_as(counted)[counted]


def _ask(routers: nn.ModuleList, tree: RouteTree, features: torch.Tensor) -> torch.Tensor:
    """Return the scores [..., N, P, E] of features [N, P, inputs, D], those of a site by its router in one go."""
    sites = [[i for i, prefix in enumerate(tree.prefixes) if len(prefix) == site] for site in range(len(routers))]
    found = [
        router(features[:, nodes].flatten(0, 1)).unflatten(-2, (len(features), len(nodes)))
        for router, nodes in zip(routers, sites, strict=True)
    ]
    widest = max(scores.shape[-1] for scores in found)
    padded = [nn.functional.pad(scores, (0, widest - scores.shape[-1]), value=-torch.inf) for scores in found]
    order = torch.tensor([node for nodes in sites for node in nodes]).argsort()
    return torch.cat(padded, dim=-2)[..., order, :]


@dataclass(frozen=True)
class Outcome:
    """What a policy, or a fixed route, does on average.

    Attributes:
        fraction: FLOPs of the prefill, as a fraction of the original's.
        distortion: KL from the teacher, nats per answer token.
        agreement: fraction of answer tokens on which the most likely token is the teacher's.
        shares: how often each route is taken.
    """

    fraction: float
    distortion: float
    agreement: float
    shares: dict[Route, float]


def outcome(table: RouteTable, taken: torch.Tensor) -> Outcome:
    """Average a table over the routes that its samples take, [N] indices."""
    rows = torch.arange(len(taken))
    counts = taken.bincount(minlength=len(table.tree.routes)).tolist()
    shares = {r: n / len(taken) for r, n in zip(table.tree.routes, counts, strict=True) if n}
    return Outcome(
        fraction=table.fraction[rows, taken].double().mean().item(),
        distortion=table.distortion[rows, taken].double().mean().item(),
        agreement=table.agreement[rows, taken].double().mean().item(),
        shares=dict(sorted(shares.items(), key=lambda item: -item[1])),
    )


def fixed_routes(table: RouteTable) -> dict[Route, Outcome]:
    """Return the outcome of every route that all samples were sent down, were it taken by all."""
    return {
        route: outcome(table, torch.full((len(table.distortion),), i))
        for i, route in enumerate(table.tree.routes)
        if table.measured[:, i].all()
    }
