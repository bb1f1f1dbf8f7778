"""What does healing bring? Fidelity on held-out samples at some budgets, with and without it.

Calibrate one checkpoint twice, at one budget, then compare the two:

    dpn convert demo --output plain && dpn calibrate --model plain --data demo --budget 0.15
    dpn convert demo --output healed && dpn calibrate --model healed --data demo --budget 0.15 --heal lora
    python benchmarks/healing.py --plain plain --healed healed

Both answer the same samples as their routers choose, each for the budget as it has solved it; the teacher is the
original. "Won back" is how much of the agreement that the plain model has lost the healed one has. Intervals are 95%,
of a paired bootstrap over the samples. The line of budget 1 is the full route.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from calibration import BUDGETS, Method, Opened, show, take

from dpn_cli import console
from dpn_cli.data.options import DataOptions
from dpn_cli.intervals import Estimate, bootstrap_mean


@dataclass(frozen=True)
class Row:
    """Both models at a budget.

    Attributes:
        budget: Budget that was asked for; 1 for the full route.
        fractions: Fractions of the FLOPs that the plain and the healed model spend.
        agreement: Share of answer tokens that are the teacher's, of both.
        distortion: KL from the teacher in nats per answer token, of both.
        more_agreement: The healed model's agreement, less the plain one's.
        less_distortion: The plain model's KL, less the healed one's.
    """

    budget: float
    fractions: tuple[float, float]
    agreement: tuple[float, float]
    distortion: tuple[float, float]
    more_agreement: Estimate
    less_distortion: Estimate

    @classmethod
    def of(cls, budget: float, plain: Method, healed: Method) -> "Row":
        """Compare the two, sample by sample."""
        both = (plain, healed)
        return cls(
            budget,
            *(
                tuple(getattr(each, name).mean().item() for each in both)
                for name in ("fraction", "agreement", "distortion")
            ),
            bootstrap_mean((healed.agreement - plain.agreement).tolist()),
            bootstrap_mean((plain.distortion - healed.distortion).tolist()),
        )

    def cells(self) -> tuple[str, ...]:
        """Return the row of the printed table."""
        lost = 1 - self.agreement[0]
        return (
            f"{self.budget:g}",
            " → ".join(f"{each:.3f}" for each in self.fractions),
            " → ".join(f"{each:.2%}" for each in self.agreement),
            show(self.more_agreement, "+.2f", 100),
            f"{self.more_agreement.value / lost:.0%}" if lost else "",
            " → ".join(f"{each:.4f}" for each in self.distortion),
            show(self.less_distortion, "+.4f"),
        )


def methods(opened: Opened, name: str, budgets: tuple[float, ...]) -> dict[float, Method]:
    """Return what a model does at every budget, and down its full route."""
    table, policy = opened.routed(f"measuring the {name} model")
    pyramid = opened.network.pyramid
    found = {1.0: take(table, name, torch.zeros(len(table.fraction), dtype=torch.long))}
    for budget in budgets:
        found[budget] = take(table, name, policy.choose_as(pyramid, pyramid.trade_off_for(budget)))
    return found


@click.command()
@click.option("--plain", type=click.Path(path_type=Path), required=True, help="A calibrated folder.")
@click.option("--healed", type=click.Path(path_type=Path), required=True, help="The same, calibrated with --heal lora.")
@click.option("--data", default="demo", show_default=True)
@click.option("--samples", default=600, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--budget", "budgets", type=float, multiple=True, default=BUDGETS, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(
    plain: Path, healed: Path, data: str, samples: int, batch_size: int, budgets: tuple[float, ...], as_json: bool
) -> None:
    """Print a line per budget."""
    folders = {"plain": plain, "healed": healed}
    found = {
        name: methods(Opened.of(folder, DataOptions(data), samples, batch_size), name, budgets)
        for name, folder in folders.items()
    }
    rows = [Row.of(budget, found["plain"][budget], found["healed"][budget]) for budget in (1.0, *budgets)]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    columns = ["budget", "FLOPs", "agreement", "healed, less plain, % (95%)", "won back", "KL", "less KL (95%)"]
    console.table(f"{samples} held-out samples", columns, [row.cells() for row in rows])


if __name__ == "__main__":
    main()
