"""Rollouts: what every route does to every calibration sample, measured with forward passes only.

The routes of a pyramid form a tree: a node is a prefix of a route, its children are the rates that the next site
offers. Walking it depth first runs each layer once per prefix, so the vision tower and the layers before the first
site run once per sample. The first leaf is the full route, which is the teacher.

Shapes: N samples, B batch, A answer tokens, R routes, P prefixes, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from dpn_cli.calibration.encoding import IGNORED, Example, collate
from dpn_cli.cost import flops_fraction
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration
from dpn_cli.modeling.pyramid_config import Grid, PyramidConfig, Route
from dpn_cli.modeling.pyramid_text import PyramidState


@dataclass(frozen=True)
class RouteTree:
    """All routes and their proper prefixes, indexed.

    Attributes:
        routes: the leaves, the full route first.
        prefixes: the inner nodes, the empty one first.
    """

    routes: tuple[Route, ...]
    prefixes: tuple[Route, ...]

    @classmethod
    def of(cls, pyramid: PyramidConfig, grids: Sequence[Sequence[Grid]]) -> "RouteTree":
        """Build the tree of all routes that some sample is offered."""
        routes = sorted({route for sample in set(map(tuple, grids)) for route in pyramid.routes(sample)})
        prefixes = {route[:site] for route in routes for site in range(len(pyramid.sites))}
        return cls(tuple(routes), tuple(sorted(prefixes, key=lambda prefix: (len(prefix), prefix))))


@dataclass(frozen=True)
class RouteTable:
    """The measurements. A route that a sample is not offered has infinite distortion.

    Attributes:
        tree: names the columns.
        features: [N, P, inputs, D] in float16, what a router reads at every prefix.
        distortion: [N, R] KL(teacher ‖ route) in nats, the mean over the answer tokens.
        agreement: [N, R] fraction of the answer tokens whose most likely token is the teacher's.
        fraction: [N, R] FLOPs of the whole prefill, as a fraction of the unpooled one's.
    """

    tree: RouteTree
    features: torch.Tensor
    distortion: torch.Tensor
    agreement: torch.Tensor
    fraction: torch.Tensor

    def select(self, rows: torch.Tensor) -> "RouteTable":
        """Return the table of some samples."""
        columns = (self.features, self.distortion, self.agreement, self.fraction)
        return RouteTable(self.tree, *(column[rows] for column in columns))


def measure(
    model: DpnLlavaForConditionalGeneration,
    examples: Sequence[Example],
    batch_size: int,
    pad_token_id: int,
    advance: Callable[[int], None] = lambda done: None,
) -> RouteTable:
    """Run every sample down every route that it is offered.

    Args:
        model: converted, in eval mode.
        examples: each with at least one image and one label.
        batch_size: samples per forward pass; only samples with equally many images share one.
        pad_token_id: fills up the shorter ones.
        advance: called with the number of samples done after each batch.

    Returns:
        The table, in the order of `examples`.
    """
    text_model: Any = model.model.language_model
    counts = [len(example.pixel_values) for example in examples]
    grid = model.model.image_grid()
    tree = RouteTree.of(model.pyramid, [[grid] * count for count in counts])
    size = (len(examples), len(tree.routes))
    table = RouteTable(
        tree,
        torch.zeros(len(examples), len(tree.prefixes), model.pyramid.router.num_inputs, text_model.shape.hidden_size)
        .half(),
        torch.full(size, torch.inf),
        torch.zeros(size),
        torch.ones(size),
    )  # fmt: skip
    for rows in _batches(counts, batch_size):
        batch = collate([examples[i] for i in rows], pad_token_id, model.device)
        with torch.inference_mode():
            _measure_batch(model, batch, table, torch.tensor(rows))
        advance(len(rows))
    return table


def _batches(counts: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of samples with equal image counts, up to `batch_size` of them at a time."""
    for count in sorted(set(counts)):
        same = [i for i, each in enumerate(counts) if each == count]
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]


def _measure_batch(
    model: DpnLlavaForConditionalGeneration,
    batch: dict[str, torch.Tensor],
    table: RouteTable,
    rows: torch.Tensor,
) -> None:
    """Fill the rows of one batch in."""
    text_model: Any = model.model.language_model
    labels = batch["labels"]
    answers = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # the positions that predict answer tokens
    teacher: list[torch.Tensor] = []  # its log-probabilities [A, V], from the first leaf on
    for state in walk(model, batch):
        [prefix] = set(state.routes)
        if len(prefix) < len(model.pyramid.sites):
            node = table.tree.prefixes.index(prefix)
            table.features[rows, node] = text_model.router_features(state).half().cpu()
            continue
        hidden_states = text_model.finish(state)[:, :-1][answers]
        log_probs = F.log_softmax(model.lm_head(hidden_states).float(), dim=-1)  # [A, V]
        if not teacher:
            teacher.append(log_probs if model.pyramid.gate == "none" else _teacher(model, batch, answers))
        leaf = table.tree.routes.index(prefix)
        divergence = (teacher[0].exp() * (teacher[0] - log_probs)).sum(-1).clamp(min=0)
        same = (teacher[0].argmax(-1) == log_probs.argmax(-1)).float()
        table.distortion[rows, leaf] = _mean_by_row(divergence, answers[0], len(rows))
        table.agreement[rows, leaf] = _mean_by_row(same, answers[0], len(rows))
        table.fraction[rows, leaf] = torch.tensor(
            [
                flops_fraction(text_model.shape, model.pyramid, prefix, grids, text)
                for grids, text in zip(state.image_grids, state.text_tokens, strict=True)
            ]
        )


def walk(model: DpnLlavaForConditionalGeneration, batch: dict[str, torch.Tensor]) -> Iterator[PyramidState]:
    """Yield the state after every segment along every route of a batch, depth first, the full route first."""
    text_model: Any = model.model.language_model
    embeds, coords = model.model.embed(batch["input_ids"], batch["pixel_values"])
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    last = (batch["labels"] != IGNORED).int().argmax(1) - 1
    root = text_model.start(embeds, mask, positions, coords, last)

    def visit(state: PyramidState, site: int) -> Iterator[PyramidState]:
        state = text_model.run_segment(state, site)
        yield state
        if site == len(model.pyramid.sites):
            return
        for k in model.pyramid.offered(site, state.grids[0]):
            choice = text_model.take(state, site, [k] * len(mask))
            yield from visit(text_model.pool(state, site, choice), site + 1)

    return visit(root, 0)


def _teacher(
    model: DpnLlavaForConditionalGeneration, batch: dict[str, torch.Tensor], answers: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Return the log-probabilities [A, V] of the model with its pyramid off."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with model.teacher():
        logits = model(**inputs).logits
    return F.log_softmax(logits[:, :-1][answers].float(), dim=-1)


def _mean_by_row(values: torch.Tensor, row: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the mean of values [A] over the answer tokens of every row, [num_rows]."""
    total = values.new_zeros(num_rows).index_add(0, row, values)
    return (total / row.bincount(minlength=num_rows)).cpu()
