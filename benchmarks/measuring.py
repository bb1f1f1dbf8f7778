"""Should a calibration send many samples down a few routes each, or few samples down all of them?

Run it on a calibrated folder, whose routes it takes:

    python benchmarks/measuring.py --model dpn-demo/demo-dpn --samples 2048 --held-out 512

All samples are measured on all routes once. Then routers are fitted to a part of these measurements, as if nothing else
had been measured, and judged on held-out samples, which no fit and no early stopping has seen. What the measurement of
such a part costs is counted in prefills of one sample with all tokens: routes share the layers before they part, so
that a few routes cost less than all, but not in proportion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import click
import torch

from dpn_cli import console
from dpn_cli.calibration.budgets import budget_table
from dpn_cli.calibration.fitting import fit_routers
from dpn_cli.calibration.forecast import tree_flops
from dpn_cli.calibration.policy import Policy, outcome
from dpn_cli.calibration.rollout import Batch, RouteTable, RouteTree, measure, plan_batches
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.data.encoding import Encoded, expected_grids
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.inference.loading import load_model, load_processor
from dpn_cli.modeling.routers import new_routers
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.experts import Grid
from dpn_cli.pyramid.shape import DecoderShape

BUDGETS = (0.4, 0.3, 0.25, 0.2, 0.15)
ANSWER_TOKENS, BATCH, EPOCHS = 12, 32, 40
STOPPING = 256  # samples that say when to stop
FEW = 12  # routes


@dataclass(frozen=True)
class Measured:
    """Samples that were measured on all routes of a pyramid.

    Attributes:
        table: the measurements.
        grids: Visual grids of every sample.
        pyramid: the pyramid.
        shape: the decoder's.
    """

    table: RouteTable
    grids: Sequence[tuple[Grid, ...]]
    pyramid: PyramidConfig
    shape: DecoderShape

    def batches(self, rows: Sequence[int], num_routes: int | None) -> list[Batch]:
        """Return how a calibration would measure some samples on so many routes each."""
        grids = [self.grids[row] for row in rows]
        return plan_batches(self.table.tree, self.pyramid, grids, BATCH, num_routes)

    def part(self, rows: Sequence[int], num_routes: int | None) -> RouteTable:
        """Return the table of some samples as if each had been measured on so many routes."""
        table = self.table.part(rows)
        measured, routes = torch.zeros_like(table.offered), self.table.tree.routes
        for batch in self.batches(rows, num_routes):
            columns = torch.tensor([routes.index(route) for route in batch.routes])
            measured[torch.tensor(batch.rows)[:, None], columns] = True
        return replace(table, distortion=table.distortion.masked_fill(~measured, torch.nan))

    def prefills(self, rows: Sequence[int], num_routes: int | None) -> float:
        """Return what measuring costs, in prefills of a sample with all tokens."""
        full, total = [self.pyramid.full_route], 0.0
        for batch in self.batches(rows, num_routes):
            length = self.grids[rows[batch.rows[0]]], 0
            some, one = (tree_flops(self.shape, self.pyramid, each, length) for each in (batch.routes, full))
            total += len(batch.rows) * some / one
        return total


def measure_all(folder: Path, counts: dict[str, int]) -> Measured:
    """Measure samples of some of the demo's splits on all routes of a checkpoint, split after split."""
    model, processor = load_model(folder, torch.float32), load_processor(folder)
    layout, pyramid = open_converted(folder)[1:]
    splits = (load_data(DataOptions("demo"), split=name, limit=count).samples for name, count in counts.items())
    samples = [sample for split in splits for sample in split]
    grids = [expected_grids(sample, layout) for sample in samples]
    tree = RouteTree.of(pyramid, grids)
    batches = plan_batches(tree, pyramid, grids, BATCH, None)
    with console.progress("measuring routes", len(samples)) as advance:
        pad = processor.tokenizer.pad_token_id
        examples = Encoded(samples, processor, ANSWER_TOKENS)
        table = measure(model, examples, tree, batches, pad, advance=advance)
    return Measured(table, grids, pyramid, layout.shape)


def judge(measured: Measured, fitted: RouteTable, stopping: RouteTable, held: RouteTable) -> list[str]:
    """Fit routers, and return KL and top-1 on held-out samples at every budget."""
    routers = new_routers(measured.shape.hidden_size, measured.pyramid)
    fit_routers(routers, fitted.loss, stopping.loss, EPOCHS, None, seed=0)
    routers.requires_grad_(False)
    means = tuple(fitted.loss.distortion.nanmean(0).nan_to_num(0.0).tolist())
    pyramid = replace(measured.pyramid, mean_losses=means, budgets=budget_table(routers, held, means))
    policy = Policy.of(routers, held)
    cells = []
    for budget in BUDGETS:
        found = outcome(held, policy.choose_as(pyramid, pyramid.trade_off_for(budget)))
        cells.append(f"{found.distortion:.3f} / {100 * found.agreement:.1f}")
    return cells


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True)
@click.option("--samples", type=int, default=2048, help="Of the calibration split, to fit routers to.")
@click.option("--held-out", type=int, default=512, help="Of the held-out split, to judge them by.")
def main(model: Path, samples: int, held_out: int) -> None:
    """Print what routers are worth by how many samples and routes they were fitted to."""
    measured = measure_all(model, {"calibration": samples + STOPPING, "heldout": held_out})
    ends = (samples, samples + STOPPING, samples + STOPPING + held_out)
    stopping, held = (measured.table.part(range(first, last)) for first, last in pairwise(ends))
    num_routes = len(measured.table.tree.routes)
    rows = []
    plans = [(samples, FEW), *((samples >> halvings, None) for halvings in (3, 2, 1, 0))]
    for count, few in plans:
        fitted = measured.part(range(count), few)
        cost = measured.prefills(range(count), few)
        rows.append((count, few or num_routes, f"{cost:,.0f}", *judge(measured, fitted, stopping, held)))
    columns = ["samples", "routes of each", "prefills", *(f"at {budget:g}" for budget in BUDGETS)]
    console.table(f"KL in nats / top-1 in % on {held_out} held-out samples", columns, rows)


if __name__ == "__main__":
    main()
