"""The survey: which experts fit this model, found by measuring candidates on a few samples.

Candidate routes are built up, one expert more per round: those of one expert, then the best of these with another
expert at a later site, and so on. A set of routes has the safest of every price, and those that lower most what an
oracle would pay that takes the best of them for every sample, loss + λ·FLOPs in the mean over λ of every size. That
gain is submodular, so the greedy choice is near the best one. The best candidates are measured again on more samples
before the choice. Source: ours.

Shapes: N samples, R candidate routes, T values of λ.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dpn_cli.calibration.fitting import NUM_TRADE_OFFS, spread_of_trade_offs
from dpn_cli.calibration.rollout import RouteTable, RouteTree, loss
from dpn_cli.inference.threads import one_thread
from dpn_cli.pyramid.calibration_recipe import SurveyRecipe
from dpn_cli.pyramid.config import PyramidConfig, Route, Site
from dpn_cli.pyramid.experts import Grid
from dpn_cli.pyramid.route import format_route

MOST_EXPERTS = 3  # that reduce, on a route
SHORTLIST = 2  # times the routes to choose are measured again
FINAL_SAMPLES = 4  # times the samples
PRICE_STEPS = (4, 8, 16, 32, 64, 128, 256)  # between the cheapest and the full route


@dataclass(frozen=True)
class Candidates:
    """Measured candidate routes.

    Attributes:
        routes: the full one first.
        distortion: [N, R] KL from the teacher in nats; infinite where a sample is not offered the route.
        fraction: [N, R] FLOPs, as a fraction of the original's.
        agreement: [N, R] of the answer tokens; NaN where a sample is not offered the route.
    """

    routes: tuple[Route, ...]
    distortion: torch.Tensor
    fraction: torch.Tensor
    agreement: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """What routes lose against the full one, [N, R]."""
        return loss(self.distortion)

    @classmethod
    def of(cls, table: RouteTable) -> "Candidates":
        """Take a round's measurements."""
        return cls(table.tree.routes, table.distortion.nan_to_num(torch.inf), table.fraction, table.agreement)

    def means(self) -> dict[Route, tuple[float, float, float]]:
        """Return the mean FLOPs fraction, distortion and agreement of every route, over the samples that have it."""
        has = self.distortion.isfinite()
        columns = (
            torch.where(has, values, torch.nan).nanmean(0).tolist()
            for values in (self.fraction, self.distortion, self.agreement)
        )
        return dict(zip(self.routes, zip(*columns, strict=True), strict=True))

    def joined(self, other: "Candidates") -> "Candidates":
        """Return these and those that another round has added."""
        new = [i for i, route in enumerate(other.routes) if route not in self.routes]
        pairs = [
            (self.distortion, other.distortion),
            (self.fraction, other.fraction),
            (self.agreement, other.agreement),
        ]
        routes = (*self.routes, *(other.routes[i] for i in new))
        return Candidates(routes, *(torch.cat([a, b[:, new]], dim=1) for a, b in pairs))

    @one_thread()
    def best_set(self, size: int) -> list[int]:
        """Return the indices of the routes to have, the full one first; at most `size`.

        By turns the safest of its price, as few samples cannot tell how often a cheap route fails, and the one that an
        oracle would want most.
        """
        trade_off = spread_of_trade_offs(NUM_TRADE_OFFS)  # [T]
        cost = self.loss[..., None] + trade_off * self.fraction[..., None]  # [N, R, T]
        scale = cost.mean(0).min(0).values  # of the best fixed route at every λ, [T]
        chosen = [0]
        safest = (i for i in self._safest() if i not in chosen)
        while len(chosen) < min(size, len(self.routes)):
            following = next(safest, None) if len(chosen) % 2 else None
            if following is None:
                following = _most_wanted(cost, scale, chosen)
            if following is None:
                following = next(safest, None)
            if following is None:
                break
            chosen.append(following)
        return chosen

    def within(self, budget: float) -> int:
        """Return the best route whose mean FLOPs are within a budget, or the cheapest one."""
        fraction = self.fraction.mean(0)
        limit = max(budget, float(fraction.min()))
        return int(self.distortion.mean(0).masked_fill(fraction > limit, torch.inf).argmin())

    def _safest(self) -> Iterator[int]:
        """Yield the safest route of every step in FLOPs, the steps being even, finer ones in each round.

        It has the smallest mean of losses' square roots: that tells more of other samples than the mean itself.
        """
        has = self.distortion.isfinite()
        price, risk = (torch.where(has, values, torch.nan).nanmean(0) for values in (self.fraction, self.loss.sqrt()))
        depth = (price - price.min()) / (price.max() - price.min()).clamp(min=1e-9)
        for count in PRICE_STEPS:
            steps = (depth * count).long().clamp(max=count - 1)
            for step in steps.unique().tolist():
                [there] = (steps == step).nonzero(as_tuple=True)
                yield int(there[risk[there].argmin()])


def _most_wanted(cost: torch.Tensor, scale: torch.Tensor, chosen: Sequence[int]) -> int | None:
    """Return the route that lowers most what an oracle pays, [N, R, T] over a scale [T]; None where no route does."""
    least = cost[:, chosen].min(1).values
    totals = (torch.minimum(cost, least[:, None]).mean(0) / scale).sum(-1)  # [R]
    wanted = int(totals.argmin())
    return wanted if totals[wanted] < (least.mean(0) / scale).sum() * (1 - 1e-6) else None


@dataclass(frozen=True)
class Tried:
    """A candidate route, for a report.

    Attributes:
        experts: the names of its experts.
        chosen: whether the pyramid offers it.
        fraction: mean FLOPs, as a fraction of the original's.
        distortion: mean KL from the teacher, in nats.
        agreement: mean agreement with the teacher's answer tokens.
    """

    experts: str
    chosen: bool
    fraction: float
    distortion: float
    agreement: float


@dataclass(frozen=True)
class Survey:
    """What a survey has found.

    Attributes:
        pyramid: Pyramid with the chosen routes, and without the sites and experts that none of them uses.
        tried: all candidates, on the first samples.
        finalists: those that were measured again, on more samples.
        chosen: the indices of the chosen among the finalists.
    """

    pyramid: PyramidConfig
    tried: Candidates
    finalists: Candidates
    chosen: list[int]

    def rows(self, candidates: PyramidConfig) -> "tuple[Tried, ...]":
        """Return what was tried, by name: each route as it was measured last."""
        chosen = {self.finalists.routes[i] for i in self.chosen}
        found = {
            route: Tried(format_route(route, candidates.sites), route in chosen, *figures)
            for measured in (self.tried, self.finalists)
            for route, figures in measured.means().items()
        }
        return tuple(sorted(found.values(), key=lambda each: -each.fraction))


def survey(
    pyramid: PyramidConfig,
    grids: Sequence[tuple[Grid, ...]],
    measure: Callable[[str, RouteTree, int], RouteTable],
    recipe: SurveyRecipe,
    budget: float,
    cheapest: Sequence[Route],
) -> Survey:
    """Measure candidates and choose the routes of a pyramid.

    Args:
        pyramid: whose sites and experts are candidates.
        grids: visual grids of the samples.
        measure: returns a table, from its title, its routes and the number of samples, the first ones.
        recipe: how many samples and routes.
        budget: mean fraction of the FLOPs that some chosen route must be within.
        cheapest: the cheapest routes of the samples, which are candidates too.
    """
    full = pyramid.full_route
    some = list(dict.fromkeys(grids))
    tried: Candidates | None = None
    parents: list[Route] = [full]
    for _ in range(min(MOST_EXPERTS, len(pyramid.sites))):
        known: set[Route] = set(tried.routes) if tried else set()
        following = [*children(pyramid, parents), *(cheapest if tried is None else ())]
        routes = [route for route in dict.fromkeys(following) if route not in known and route != full]
        routes = [route for route in routes if any(_reduces(pyramid, route, each) for each in some)]
        if not routes:
            break
        title = f"trying {len(routes)} routes"
        measured = Candidates.of(measure(title, RouteTree((full, *sorted(routes)), ()), recipe.samples))
        tried = tried.joined(measured) if tried else measured
        parents = [tried.routes[i] for i in tried.best_set(recipe.width)[1:]]
    assert tried is not None, "a pyramid has sites with experts"
    shortlist = dict.fromkeys([*tried.best_set(SHORTLIST * recipe.routes), tried.within(budget)])
    tree = RouteTree((full, *sorted(tried.routes[i] for i in shortlist if i)), ())
    title = f"trying the best {len(tree.routes) - 1}"
    finalists = Candidates.of(measure(title, tree, FINAL_SAMPLES * recipe.samples))
    chosen = finalists.best_set(recipe.routes)
    if finalists.fraction.mean(0)[chosen].min() > budget:
        chosen = [*chosen[: recipe.routes - 1], finalists.within(budget)]
    return Survey(pruned(pyramid, [finalists.routes[i] for i in chosen]), tried, finalists, chosen)


def _reduces(pyramid: PyramidConfig, route: Route, grids: Sequence[Grid]) -> bool:
    """Say whether a sample with these grids can take a route, whose last expert finds visual tokens to reduce."""
    last = max(site for site, k in enumerate(route) if k)
    return pyramid.can_walk(route, grids) and pyramid.takes(pyramid.walk(route, grids)[last])


def pruned(pyramid: PyramidConfig, routes: Sequence[Route]) -> PyramidConfig:
    """Return a pyramid that offers some routes, without the sites and experts that none of them uses."""
    used = [sorted({0, *(route[site] for route in routes)}) for site in range(len(pyramid.sites))]
    kept = [site for site, experts in enumerate(used) if len(experts) > 1] or [0]
    sites = tuple(
        Site(pyramid.sites[site].after_layer, tuple(pyramid.sites[site].experts[k] for k in used[site]))
        for site in kept
    )
    renamed = {tuple(used[site].index(route[site]) for site in kept) for route in routes}
    return replace(
        pyramid,
        sites=sites,
        routes=tuple(sorted(renamed)),
        mean_losses=(),
        router=replace(pyramid.router, output="routes"),
    )


def children(pyramid: PyramidConfig, parents: Sequence[Route]) -> list[Route]:
    """Return the routes with one expert more than some have, at a site after their last one."""
    found = []
    for route in parents:
        last = max((site for site, k in enumerate(route) if k), default=-1)
        for site in range(last + 1, len(pyramid.sites)):
            for k in range(1, len(pyramid.sites[site].experts)):
                found.append((*route[:site], k, *route[site + 1 :]))
    return found
