"""How good is a calibration? Routed against random routing and the per-sample oracle at equal FLOPs, and fixed routes.

Run it on a calibrated folder:

    python benchmarks/calibration.py --model dpn-demo/demo-dpn --data demo --samples 600

The samples are of the data's held-out split, which calibration has never seen; every one is sent down every route, so
that all methods are judged on the same measurements. A fixed route is the best of the cheapest that spend as much as
the routers, or more. Intervals are 95%, of a paired bootstrap over the samples.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from dpn_cli import console
from dpn_cli.calibration.policy import Policy, fixed_routes, outcome
from dpn_cli.calibration.rollout import RouteTable, measure, plan_batches, sample_grids
from dpn_cli.data.encoding import encode
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.inference.loading import load_model, load_processor
from dpn_cli.intervals import bootstrap_mean
from dpn_cli.pyramid.config import PyramidConfig

BUDGETS = (0.8, 0.65, 0.55, 0.5, 0.44, 0.4)  # and the cheapest


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


def best_fixed(table: RouteTable, fraction: float) -> Method:
    """Return the fixed route with the least KL among those of `fraction` or more, or the next cheaper one."""
    fixed = fixed_routes(table)
    dear = {route: o for route, o in fixed.items() if o.fraction >= fraction}
    nearest = min(dear.values(), key=lambda o: o.fraction).fraction + 0.02
    route = min((r for r in dear if dear[r].fraction <= nearest), key=lambda r: dear[r].distortion)
    return take(table, f"fixed {route}", torch.full((len(table.fraction),), table.tree.routes.index(route)))


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


def measure_held_out(model: Path, data: str, samples: int, batch_size: int) -> tuple[RouteTable, Policy, PyramidConfig]:
    """Send held-out samples down every route; also return what the model's routers make of them."""
    network = load_model(model)
    processor = load_processor(model)
    held_out = load_data(DataOptions(data), split="heldout", limit=samples).samples
    examples = [encode(sample, processor, answer_tokens=8) for sample in held_out]
    grids = sample_grids(network, examples)
    batches = plan_batches(network.pyramid, grids, batch_size, None)
    with console.progress("measuring routes", len(examples)) as advance:
        table = measure(network, examples, batches, processor.tokenizer.pad_token_id, advance=advance)
    with torch.no_grad():
        return table, Policy.of(network.text_model.routers.cpu().float(), table), network.pyramid


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="A calibrated folder.")
@click.option("--data", default="demo", show_default=True)
@click.option("--samples", default=600, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--budget", "budgets", type=float, multiple=True, default=BUDGETS, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(model: Path, data: str, samples: int, batch_size: int, budgets: tuple[float, ...], as_json: bool) -> None:
    """Measure the held-out samples once and print one block of rows per budget."""
    table, policy, pyramid = measure_held_out(model, data, samples, batch_size)
    rows = []
    for budget in (*budgets, pyramid.budgets[-1].fraction):
        routes = policy.choose(pyramid.trade_off_for(budget))
        routed = take(table, "routed", routes)
        spent = outcome(table, routes).fraction
        others = (best_fixed(table, spent), random_routing(table, routes), oracle(table, spent))
        rows += [Row.of(budget, each, routed) for each in (routed, *others)]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    columns = ["budget", "method", "FLOPs", "KL", "top-1", "KL above the routed, 95%", "top-1 below it, 95%"]
    title = f"{len(table.fraction)} held-out samples, {len(table.tree.routes)} routes"
    console.table(title, columns, [row.cells() for row in rows])


if __name__ == "__main__":
    main()
