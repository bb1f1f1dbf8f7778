"""How good is a calibration? Routed against random routing and the per-sample oracle at equal FLOPs, and fixed routes.

Run it on a calibrated folder:

    python benchmarks/calibration.py --model dpn-demo/demo-dpn --data demo --samples 600

The samples are of the data's held-out split, which calibration has never seen; every one is sent down every route, so
that all methods are judged on the same measurements. The fixed route is the best on these samples of all that the
survey has tried on others (its best 40), the whole menu of experts, and may spend as much as the routers. "Closed" is
how much of the gap from it to the oracle the routers close. Intervals are 95%, of a paired bootstrap over the samples.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from dpn_cli import console
from dpn_cli.calibration.policy import Policy, outcome
from dpn_cli.calibration.rollout import RouteTable, RouteTree, measure, plan_batches
from dpn_cli.calibration.settings import candidates
from dpn_cli.calibration.store import REPORT_FILE
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.data.encoding import Encoded, expected_grids
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.inference.generation import greedy_answers
from dpn_cli.inference.loading import load_model, load_processor
from dpn_cli.intervals import Estimate, bootstrap_mean
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.calibration_recipe import SurveyRecipe
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.experts import Grid
from dpn_cli.pyramid.route import format_route, parse_route

BUDGETS = (0.65, 0.5, 0.36, 0.25, 0.2, 0.15)
FIXED = 40  # routes of the survey that are measured again
ANSWER_TOKENS = 12
SLACK = 0.01  # of a FLOPs fraction, that a fixed route may spend more


@dataclass(frozen=True)
class Method:
    """One way to choose routes, on every sample: FLOPs fraction, KL and agreement, each [N]."""

    name: str
    fraction: torch.Tensor
    distortion: torch.Tensor
    agreement: torch.Tensor


def take(table: RouteTable, name: str, routes: torch.Tensor) -> Method:
    """Return the method that takes `routes`, [N] indices."""
    rows = torch.arange(len(routes))
    return Method(name, table.fraction[rows, routes], table.distortion[rows, routes], table.agreement[rows, routes])


def best_fixed(table: RouteTable, names: Sequence[str], fraction: float) -> Method:
    """Return the fixed route with the least KL of those that spend no more than `fraction`."""
    costs, losses = table.fraction.mean(0), table.distortion.nan_to_num(torch.inf).mean(0)
    best = int(losses.masked_fill(costs > fraction + SLACK, torch.inf).argmin())
    return take(table, f"fixed: {names[best]}", torch.full((len(table.fraction),), best))


def random_routing(table: RouteTable, routes: torch.Tensor) -> Method:
    """Return the expectation of routing with the same shares and no look at the samples."""
    shares = routes.bincount(minlength=len(table.tree.routes)).float() / len(routes)
    return Method(
        "random, same shares",
        table.fraction @ shares, table.distortion.nan_to_num() @ shares, table.agreement.nan_to_num() @ shares,
    )  # fmt: skip


def oracle(table: RouteTable, fraction: float) -> Method:
    """Return the routes of least D + λ·FLOPs per sample, λ solved for `fraction`."""
    low, high = 0.0, 1e3
    for _ in range(60):
        trade_off = (low + high) / 2
        routes = (table.distortion.nan_to_num(torch.inf) + trade_off * table.fraction).argmin(1)
        spent = take(table, "oracle", routes).fraction.mean()
        low, high = (trade_off, high) if spent > fraction else (low, trade_off)
    return take(table, "oracle", (table.distortion.nan_to_num(torch.inf) + high * table.fraction).argmin(1))


def interval(differences: torch.Tensor) -> tuple[float, float]:
    """Return the 95% interval of a mean of per-sample differences."""
    estimate = bootstrap_mean(differences.tolist())
    return estimate.low, estimate.high


def show(estimate: Estimate, spec: str, scale: float = 1) -> str:
    """Return an estimate and its interval, all times `scale`, in a format such as `.2f`."""
    value, low, high = (format(scale * number, spec) for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} … {high})"


@dataclass(frozen=True)
class Row:
    """A method at a budget: means over the samples.

    Attributes:
        budget: the budget that was asked for.
        method: how routes are chosen.
        fraction: fraction of the prefill FLOPs.
        distortion: KL from the teacher, nats per answer token.
        agreement: fraction of answer tokens on which the most likely token is the teacher's.
        distortion_above_routed: 95% interval of how far `distortion` is above the routed model's; None for that model
            itself.
        agreement_below_routed: 95% interval of how far `agreement` is below the routed model's; None for that model
            itself.
    """

    budget: float
    method: str
    fraction: float
    distortion: float
    agreement: float
    distortion_above_routed: tuple[float, float] | None
    agreement_below_routed: tuple[float, float] | None

    @classmethod
    def of(cls, budget: float, other: Method, routed: Method) -> "Row":
        """Average one method and compare it with the routed model, sample by sample."""
        means = (each.mean().item() for each in (other.fraction, other.distortion, other.agreement))
        if other is routed:
            return cls(budget, other.name, *means, None, None)
        above, below = other.distortion - routed.distortion, routed.agreement - other.agreement
        return cls(budget, other.name, *means, interval(above), interval(below))

    def cells(self) -> tuple[str, ...]:
        """Return the row of the printed table."""
        gaps = (self.distortion_above_routed, self.agreement_below_routed)
        return (
            f"{self.budget:.3f}", self.method, f"{self.fraction:.3f}", f"{self.distortion:.4f}",
            f"{self.agreement:.3f}", *("" if gap is None else f"{gap[0]:+.4f} … {gap[1]:+.4f}" for gap in gaps),
        )  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A calibrated model, and held-out samples with the teacher's answers."""

    network: PyramidGenerationMixin
    examples: Encoded
    grids: list[tuple[Grid, ...]]
    pad: int
    batch_size: int

    @classmethod
    def of(cls, model: Path, data: DataOptions, samples: int, batch_size: int) -> "Opened":
        """Load a model and the samples, and let the teacher answer."""
        network, processor = load_model(model, torch.float32), load_processor(model)  # as fast on every CPU
        held_out = load_data(data, split="heldout", limit=samples).samples
        with network.teacher():
            answers = greedy_answers(network, processor, held_out, batch_size, ANSWER_TOKENS)
        asked = [sample.answered(answer) for sample, answer in zip(held_out, answers, strict=True)]
        layout = open_converted(model)[1]
        grids = [expected_grids(sample, layout) for sample in asked]
        examples = Encoded(asked, processor, ANSWER_TOKENS)
        return cls(network, examples, grids, processor.tokenizer.pad_token_id, batch_size)

    def down(self, tree: RouteTree, title: str) -> RouteTable:
        """Send every sample down every route of a tree."""
        batches = plan_batches(tree, self.network.pyramid, self.grids, self.batch_size, None)
        with console.progress(title, len(self.examples)) as advance:
            return measure(self.network, self.examples, tree, batches, self.pad, advance=advance)

    def routed(self, title: str) -> tuple[RouteTable, Policy]:
        """Send every sample down every route of the pyramid, and ask its routers."""
        table = self.down(RouteTree.of(self.network.pyramid, self.grids), title)
        with torch.no_grad():
            return table, Policy.of(deepcopy(self.network.text_model.routers).cpu().float(), table)


@dataclass(frozen=True)
class Measured:
    """Held-out samples down the pyramid's routes, and down the fixed routes of the whole menu."""

    table: RouteTable
    policy: Policy
    pyramid: PyramidConfig
    fixed: RouteTable
    names: list[str]


def measure_held_out(model: Path, data: str, samples: int, batch_size: int) -> Measured:
    """Send held-out samples down every route."""
    opened = Opened.of(model, DataOptions(data), samples, batch_size)
    network = opened.network
    table, policy = opened.routed("measuring the pyramid's routes")
    menu, routes = whole_menu(model, network.pyramid)
    with network.as_pyramid(menu):
        fixed = opened.down(RouteTree(routes, ()), "measuring fixed routes")
    return Measured(table, policy, network.pyramid, fixed, [format_route(route, menu.sites) for route in routes])


def whole_menu(model: Path, pyramid: PyramidConfig) -> tuple[PyramidConfig, tuple[Route, ...]]:
    """Return the candidates of the survey, and the routes that were the best at their price."""
    _, layout, _ = open_converted(model)
    menu = candidates(model, pyramid, layout.shape.num_layers, SurveyRecipe())
    tried = json.loads((model / REPORT_FILE).read_text())["tried"]
    if menu is None or not tried:
        raise click.UsageError(
            f"{model} was calibrated on given routes: there is no survey whose routes could be fixed"
        )
    ranked: list[str] = []
    for step in range(20):  # at every price, the best first
        there = [each for each in tried if step <= 20 * each["fraction"] < step + 1]
        ranked += [each["experts"] for each in sorted(there, key=lambda each: each["distortion"])[: FIXED // 10]]
    routes = dict.fromkeys([menu.full_route, *(parse_route(name, menu.sites) for name in ranked)])
    return menu, tuple(routes)


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="A calibrated folder.")
@click.option("--data", default="demo", show_default=True)
@click.option("--samples", default=600, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--budget", "budgets", type=float, multiple=True, default=BUDGETS, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(model: Path, data: str, samples: int, batch_size: int, budgets: tuple[float, ...], as_json: bool) -> None:
    """Measure the held-out samples once and print one block of rows per budget."""
    found = measure_held_out(model, data, samples, batch_size)
    table, rows = found.table, []
    for budget in budgets:
        routes = found.policy.choose_as(found.pyramid, found.pyramid.trade_off_for(budget))
        routed, spent = take(table, "routed", routes), outcome(table, routes).fraction
        fixed, best = best_fixed(found.fixed, found.names, spent), oracle(table, spent)
        gap = (fixed.distortion - best.distortion).mean()
        closed = ((fixed.distortion - routed.distortion).mean() / gap).item() if gap > 0 else float("nan")
        others = (fixed, random_routing(table, routes), best)
        rows += [Row.of(budget, each, routed) for each in (routed, *others)]
        console.note(f"budget {budget:g}: the routers close {closed:.0%} of the gap from the fixed route to the oracle")
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    columns = ["budget", "method", "FLOPs", "KL", "top-1", "KL above the routed, 95%", "top-1 below it, 95%"]
    title = f"{len(table.fraction)} held-out samples, {len(table.tree.routes)} routes"
    console.table(title, columns, [row.cells() for row in rows])


if __name__ == "__main__":
    main()
