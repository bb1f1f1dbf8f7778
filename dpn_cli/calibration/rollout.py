"""Rollouts: what routes do to every calibration sample, measured with forward passes only.

The routes of a pyramid form a tree: a node is a prefix of a route, its children are the experts that the next site
offers. Walking it depth first runs each layer once per prefix, so the vision tower and the layers before the first site
run once per sample. The first leaf is the full route, which is the teacher unless that is another model.

Shapes: N samples, B batch, A answer tokens, R routes, P prefixes, D hidden, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dpn_cli.calibration.features import StoredFeatures
from dpn_cli.calibration.passes import start_batch
from dpn_cli.calibration.teacher import Teacher
from dpn_cli.data.encoding import Example, collate
from dpn_cli.inference.scoring import answer_log_probs, answer_positions, broken, is_broken, mean_by_row
from dpn_cli.modeling.state import PyramidState
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.processes import ALONE, Kept, Processes
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.experts import Grid, num_tokens


@dataclass(frozen=True)
class RouteTree:
    """All routes and their proper prefixes, indexed.

    Attributes:
        routes: the leaves, the full route first.
        prefixes: the inner nodes where routers are asked, the empty one first.
        is_listed: whether the pyramid lists the routes, and its routers score each.
    """

    routes: tuple[Route, ...]
    prefixes: tuple[Route, ...]
    is_listed: bool = False

    @classmethod
    def of(cls, pyramid: PyramidConfig, grids: Sequence[Sequence[Grid]]) -> "RouteTree":
        """Build the tree of the routes that a pyramid lists, or of all that some sample is offered."""
        routes = pyramid.routes
        if routes is None:
            routes = tuple(sorted({route for sample in set(map(tuple, grids)) for route in pyramid.routes_for(sample)}))
        prefixes = {route[:site] for route in routes for site in range(len(pyramid.sites))}
        return cls(routes, tuple(sorted(prefixes, key=lambda each: (len(each), each))), pyramid.routes is not None)

    def offered(self, pyramid: PyramidConfig, grids: Sequence[Grid]) -> tuple[Route, ...]:
        """Return the routes that a sample with these grids can take."""
        return tuple(route for route in self.routes if pyramid.can_walk(route, grids))


@dataclass(frozen=True)
class RouteTable:
    """The measurements.

    Attributes:
        tree: names the columns.
        features: [N, P, inputs, D] in float16, what a router reads at every prefix of a measured route; in memory or
            in a file.
        offered: [N, R] bool, whether the sample may take the route.
        distortion: [N, R] KL(teacher ‖ route) in nats, the mean over the answer tokens; NaN where not measured.
        agreement: [N, R] fraction of the answer tokens whose most likely token is the teacher's; NaN likewise.
        fraction: [N, R] FLOPs of the whole prefill, as a fraction of the original's.
    """

    tree: RouteTree
    features: torch.Tensor | StoredFeatures
    offered: torch.Tensor
    distortion: torch.Tensor
    agreement: torch.Tensor
    fraction: torch.Tensor

    @property
    def hidden_size(self) -> int:
        """D."""
        return (self.features.size if isinstance(self.features, StoredFeatures) else self.features.shape)[-1]

    @property
    def measured(self) -> torch.Tensor:
        """Which samples were sent down which routes, [N, R] bool."""
        return ~self.distortion.isnan()

    @property
    def loss(self) -> "RouteTable":
        """The table with the loss of every route in place of its distortion, as routers predict it; see `loss`."""
        return replace(self, distortion=loss(self.distortion))

    def select(self, rows: torch.Tensor) -> "RouteTable":
        """Return the table of some samples, in memory."""
        return self._of(rows, self.features[rows])

    def part(self, rows: Sequence[int]) -> "RouteTable":
        """Return the table of some samples; features that are in a file stay there."""
        features = self.features
        return self._of(
            torch.tensor(rows), features.part(rows) if isinstance(features, StoredFeatures) else features[rows]
        )

    def _of(self, rows: torch.Tensor, features: torch.Tensor | StoredFeatures) -> "RouteTable":
        columns = (self.offered, self.distortion, self.agreement, self.fraction)
        return RouteTable(self.tree, features, *(column[rows] for column in columns))


def loss(distortion: torch.Tensor) -> torch.Tensor:
    """Return the loss 1 - exp(-d) of every route, where d is what it adds to the full one's distortion, in nats.

    A small loss is that of the distortion. An answer that is lost counts as one, however far off the route is: a mean
    of nats would be that of a few samples, and the routers would learn those.

    Args:
        distortion: [N, R], the full route first; infinite where a route is not offered, which then its loss is too.
    """
    added = (distortion - distortion[:, :1]).clamp(min=0)
    return torch.where(added.isinf(), added, -torch.expm1(-added))


@dataclass(frozen=True)
class Batch:
    """Samples that share their forward passes, and the routes that they are sent down, the full one among them."""

    rows: tuple[int, ...]
    routes: tuple[Route, ...]


def plan_batches(
    tree: RouteTree,
    pyramid: PyramidConfig,
    grids: Sequence[tuple[Grid, ...]],
    batch_size: int,
    num_routes: int | None,
    complete: Collection[int] = (),
) -> list[Batch]:
    """Say which samples run together, and down which routes.

    Args:
        tree: Tree of the routes.
        pyramid: Pyramid of the routes.
        grids: Visual grids, per sample; only samples that are offered the same routes share a batch.
        batch_size: samples per batch, at most.
        num_routes: routes per batch, the full one among them and the others equally often; None for all.
        complete: samples that are sent down all routes nevertheless.
    """
    batches = []
    seen: Counter[Route] = Counter()
    offered = {grid: tree.offered(pyramid, grid) for grid in set(grids)}
    groups: dict[tuple[bool, tuple[Route, ...]], list[int]] = {}
    for i in sorted(range(len(grids)), key=lambda i: num_tokens(grids[i])):
        groups.setdefault((i in complete, offered[grids[i]]), []).append(i)
    for (all_routes, routes), rows in sorted(groups.items()):
        for start in range(0, len(rows), batch_size):
            full, *rest = routes
            if num_routes and not all_routes:
                rest = sorted(rest, key=seen.__getitem__)[: num_routes - 1]
                seen.update(rest)
            batches.append(Batch(tuple(rows[start : start + batch_size]), (full, *sorted(rest))))
    return batches


def measure(
    model: PyramidGenerationMixin,
    examples: Sequence[Example],
    tree: RouteTree,
    batches: Sequence[Batch],
    pad_token_id: int,
    kept: Kept[dict[str, torch.Tensor]] | None = None,
    features: Path | None = None,
    processes: Processes = ALONE,
    advance: Callable[[int], None] = lambda done: None,
    other: Teacher | None = None,
) -> RouteTable:
    """Run every batch down its routes.

    Args:
        model: converted, in eval mode.
        examples: each with at least one image and one label.
        tree: names the columns; nothing is kept for routers where it has no prefixes.
        batches: Batches that `plan_batches` made.
        pad_token_id: fills up the shorter samples of a batch.
        kept: keeps each batch as soon as it is measured, and brings back those of an earlier run.
        features: the file to keep in what routers read; None to keep it in memory.
        processes: Processes that measure together, a batch at a time each.
        advance: called with the number of samples done after each batch.
        other: Teacher that is another model; None for the model itself.

    Returns:
        The table, in the order of `examples`; complete in the main process only.

    Raises:
        DataError: naming the sample that the model answers with NaN.
        CheckpointError: if the model's weights are to blame for that.
    """
    hidden_size, num_inputs = model.text_model.shape.hidden_size, model.pyramid.router.num_inputs
    size = (len(examples), len(tree.routes))
    read = (len(examples), len(tree.prefixes), num_inputs, hidden_size)
    table = RouteTable(
        tree=tree,
        features=StoredFeatures.create(features, read) if features else torch.zeros(read, dtype=torch.float16),
        offered=torch.zeros(size, dtype=torch.bool),
        distortion=torch.full(size, torch.nan),
        agreement=torch.full(size, torch.nan),
        fraction=torch.ones(size),
    )

    def work(i: int) -> dict[str, torch.Tensor]:
        some = [examples[row] for row in batches[i].rows]
        with torch.inference_mode():
            inputs = collate(some, pad_token_id, model.device)
            teacher = _teacher(model, inputs) if other is None else other.log_probs(some, model.lm_head.out_features)
            measured = _measure_batch(model, inputs, batches[i], tree, teacher)
        tried = [tree.routes.index(route) for route in batches[i].routes]
        _validate_finite(measured["distortion"][:, tried], some, [model, *([other.model] if other else [])])
        return measured

    def take(i: int, measured: dict[str, torch.Tensor]) -> None:
        rows = torch.tensor(batches[i].rows)
        for name, values in measured.items():
            getattr(table, name)[rows] = values
        advance(len(rows))

    processes.share(len(batches), work, take, kept)
    return table


def _measure_batch(
    model: PyramidGenerationMixin,
    inputs: dict[str, torch.Tensor],
    batch: Batch,
    tree: RouteTree,
    teacher: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Return one batch's rows of the table, by column; the teacher's log-probabilities are [A, V], None the first's."""
    text_model: Any = model.text_model
    size = (len(batch.rows), len(tree.routes))
    distortion, agreement = torch.full(size, torch.nan), torch.full(size, torch.nan)
    features: list[torch.Tensor | None] = [None] * len(tree.prefixes)
    answers = answer_positions(inputs["labels"])
    vocab_size = None if teacher is None else teacher.shape[1]
    expected: tuple[torch.Tensor, torch.Tensor] | None = None  # the teacher's probabilities and most likely tokens
    for state in walk(model, inputs, batch.routes):
        [prefix] = set(state.routes)
        if prefix in tree.prefixes:
            features[tree.prefixes.index(prefix)] = text_model.router_features(state).half().cpu()
        if len(prefix) < len(model.pyramid.sites):
            continue
        hidden_states = text_model.finish(state)[:, :-1][answers]
        log_probs = F.log_softmax(model.lm_head(hidden_states)[:, :vocab_size].float(), dim=-1)  # [A, V]
        teacher = log_probs if teacher is None else teacher
        if expected is None:
            if (hopeless := is_broken(teacher, answers[0], len(batch.rows))).any():
                distortion[~hopeless] = 0  # the others are not to blame, and experts cannot choose by NaN
                break
            expected = teacher.exp(), teacher.argmax(-1)
        leaf = tree.routes.index(prefix)
        divergence = (expected[0] * (teacher - log_probs)).sum(-1).clamp(min=0)
        same = (expected[1] == log_probs.argmax(-1)).float()
        distortion[:, leaf] = mean_by_row(divergence, answers[0], len(batch.rows))
        agreement[:, leaf] = mean_by_row(same, answers[0], len(batch.rows))
    columns = {"distortion": distortion, "agreement": agreement, **_price(text_model, state, tree)}
    if known := [each for each in features if each is not None]:
        nowhere = torch.zeros_like(known[0])
        columns["features"] = torch.stack([nowhere if each is None else each for each in features], dim=1)
    return columns


def _validate_finite(
    distortion: torch.Tensor, examples: Sequence[Example], models: Sequence[PyramidGenerationMixin]
) -> None:
    """Check that all routes [B, R] could be measured: NaN is for those that were not tried."""
    for example, is_finite in zip(examples, distortion.isfinite().all(1).tolist(), strict=True):
        if not is_finite:
            raise broken(example.name, *models)


def _price(text_model: Any, state: PyramidState, tree: RouteTree) -> dict[str, torch.Tensor]:
    """Return which routes a batch is offered, and their FLOPs fractions."""
    offered = set(tree.offered(text_model.pyramid, state.image_grids[0]))
    rows = [
        [
            flops_fraction(text_model.shape, text_model.pyramid, route, grids, text) if route in offered else 1.0
            for route in tree.routes
        ]
        for grids, text in zip(state.image_grids, state.text_tokens, strict=True)
    ]
    mask = torch.tensor([route in offered for route in tree.routes])
    return {"fraction": torch.tensor(rows), "offered": mask.expand(len(rows), -1).clone()}


def walk(
    model: PyramidGenerationMixin, inputs: dict[str, torch.Tensor], routes: Collection[Route]
) -> Iterator[PyramidState]:
    """Yield the state after every segment along some routes of a batch, depth first, the lowest route first."""
    text_model: Any = model.text_model

    def visit(state: PyramidState, ahead: Collection[Route]) -> Iterator[PyramidState]:
        site = len(state.routes[0])
        state = text_model.run_segment(state, site)
        yield state
        if site == len(model.pyramid.sites):
            return
        for k in sorted({route[site] for route in ahead}):
            choice = text_model.take(state, site, [k] * len(state.grids))
            reduced = text_model.apply(state, site, choice)
            yield from visit(reduced, [route for route in ahead if route[site] == k])

    return visit(start_batch(model, inputs), routes)


def _teacher(model: PyramidGenerationMixin, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return what a model that is its own teacher makes of a batch; None where its full route does the same."""
    if model.pyramid.gate == "none" and not model.is_adapted:
        return None
    with model.teacher():
        return answer_log_probs(model, inputs)
