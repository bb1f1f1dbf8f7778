"""What routers decide over a measured route tree, and what that costs: exact sums, no sampling.

Shapes: N samples, R routes, P prefixes, S sites, E experts.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from dpn_cli.calibration.rollout import RouteTable
from dpn_cli.pyramid.config import Route


@dataclass(frozen=True)
class Policy:
    """Routers' scores over a table.

    Attributes:
        table: the measurements.
        logits: [N, P, E] of every site's router at every prefix; -inf where there is no such expert.
    """

    table: RouteTable
    logits: torch.Tensor

    @classmethod
    def of(cls, routers: nn.ModuleList, table: RouteTable) -> "Policy":
        """Ask the routers at every prefix of every sample."""
        columns = []
        widest = max(1 + max(route) for route in table.tree.routes)
        for node, prefix in enumerate(table.tree.prefixes):
            logits = routers[len(prefix)](table.features[:, node])
            columns.append(nn.functional.pad(logits, (0, widest - logits.shape[1]), value=-torch.inf)[:, :widest])
        return cls(table, torch.stack(columns, dim=1))

    @cached_property
    def _child(self) -> torch.Tensor:
        """The route that takes expert k at a prefix and 1×1 ever after, [P, E]; -1 where there is none."""
        routes = {route: i for i, route in enumerate(self.table.tree.routes)}
        num_sites = len(self.table.tree.routes[0])
        rows = []
        for prefix in self.table.tree.prefixes:
            rest = (0,) * (num_sites - len(prefix) - 1)
            rows.append([routes.get((*prefix, k, *rest), -1) for k in range(self.logits.shape[-1])])
        return torch.tensor(rows)

    @cached_property
    def _next(self) -> torch.Tensor:
        """The prefix that expert k leads to, [P, E]; at the last site the route instead."""
        prefixes = {prefix: i for i, prefix in enumerate(self.table.tree.prefixes)}
        routes = {route: i for i, route in enumerate(self.table.tree.routes)}
        experts = range(self.logits.shape[-1])
        return torch.tensor(
            [[prefixes.get((*p, k), routes.get((*p, k), 0)) for k in experts] for p in self.table.tree.prefixes]
        )

    @cached_property
    def _measured_below(self) -> torch.Tensor:
        """Whether some measured route takes expert k at a prefix, [N, P, E]."""
        below = torch.zeros(len(self.table.tree.routes), *self._child.shape)
        prefixes = {prefix: i for i, prefix in enumerate(self.table.tree.prefixes)}
        for i, route in enumerate(self.table.tree.routes):
            for site, k in enumerate(route):
                below[i, prefixes[route[:site]], k] = 1
        return torch.einsum("nr,rpk->npk", self.table.measured.float(), below) > 0

    def _scores(self, trade_off: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Return logit - λ·cost, [N, P, E], with one λ per sample [N]; -inf where a rate is not allowed."""
        scores = self.logits - trade_off[:, None, None] * self.table.fraction[:, self._child.clamp(min=0)]
        out_of_reach = ~allowed.any(-1, keepdim=True)  # a prefix that this sample cannot get to: anything finite
        return scores.masked_fill(~(allowed | out_of_reach), -torch.inf)

    def choose(self, trade_off: float) -> torch.Tensor:
        """Return the index of the route that every sample takes at λ, [N]."""
        rows = torch.arange(len(self.logits))
        offered = (self._child >= 0) & self.table.offered[:, self._child.clamp(min=0)]
        best = self._scores(torch.full((len(rows),), trade_off), offered).argmax(-1)  # [N, P]; ties go to the first
        node = torch.zeros_like(rows)
        for _ in self.table.tree.routes[0]:
            node = self._next[node, best[rows, node]]
        return node

    def log_probability(self, trade_off: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return log softmax((logit - λ·cost) / (temperature · λ)) summed along every measured route, [N, R].

        The softmax is over the rates that lead to a measured route; a route that was not measured gets -inf.
        """
        scores = self._scores(trade_off, self._measured_below)
        steps = (scores / (temperature * trade_off[:, None, None])).log_softmax(-1)
        return self._along_routes(steps).masked_fill(~self.table.measured, -torch.inf)

    def added_distortion(self) -> torch.Tensor:
        """Return the distortion that the routers predict for every route, [N, R]: minus its logits' sum."""
        return -self._along_routes(self.logits)

    def _along_routes(self, steps: torch.Tensor) -> torch.Tensor:
        """Sum [N, P, E] over the sites of every route, [N, R]."""
        prefixes = {prefix: i for i, prefix in enumerate(self.table.tree.prefixes)}
        paths = [[prefixes[route[:site]] for site in range(len(route))] for route in self.table.tree.routes]
        return steps[:, torch.tensor(paths), torch.tensor(self.table.tree.routes)].sum(-1)


@dataclass(frozen=True)
class Outcome:
    """What a policy, or a fixed route, does on average.

    Attributes:
        fraction: FLOPs of the prefill, as a fraction of the unpooled one's.
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
