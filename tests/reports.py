"""A report on measurements that were made up, large enough to fill every plot of its page."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dpn_cli.calibration.cases import Case, ranked
from dpn_cli.calibration.policy import Policy, outcome
from dpn_cli.calibration.reporting.report import Report
from dpn_cli.calibration.rollout import RouteTable, RouteTree
from dpn_cli.data.samples import Sample
from dpn_cli.pyramid.budgets import Budget
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.experts import pool
from dpn_cli.pyramid.shape import DecoderShape

GRIDS = ((24, 24),)
SHAPE = DecoderShape(32, 4096, 11008, 32, 32, 128, 32064)
SITES = tuple(Site(layer, pool((1, 1), (1, 2), (2, 2))) for layer in (7, 15, 23))

ORIGIN = {
    "model": "llava-hf/llava-1.5-7b-hf@0123456", "recipe": "llava-1.5-7b", "data": "mydata.json", "date": "2026-11-26",
    "device": "CPU, 2 threads, float32", "versions": "dpn-cli 0.1.0, python 3.12.1, torch 2.9.0, transformers 5.0.0",
}  # fmt: skip


class FeaturesAreLogits(nn.Module):
    """A router that says what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.flatten(1) + self.shift


def made_up_report(samples: Sequence[Sample], budget: float = 0.5) -> Report:
    """Return a report on samples whose distortion grows with pooling, and whose routers guess it roughly."""
    generator = torch.Generator().manual_seed(0)
    pyramid = PyramidConfig(sites=SITES)
    tree = RouteTree.of(pyramid, [GRIDS])
    hardness = torch.randn(len(samples), 1, generator=generator).mul(1.5).exp()
    weights = torch.tensor([[0.0, 0.06, 0.3], [0.0, 0.015, 0.06], [0.0, 0.002, 0.01]])
    pooled = torch.tensor([sum(weights[site, k].item() for site, k in enumerate(route)) for route in tree.routes])
    distortion = hardness * pooled * torch.rand(len(samples), len(tree.routes), generator=generator).add(0.5)
    guess = hardness * torch.randn(len(samples), 1, generator=generator).mul(0.4).exp()
    features = torch.stack([-guess * weights[len(prefix)] for prefix in tree.prefixes], dim=1)
    table = RouteTable(
        tree=tree,
        features=features[:, :, None].half(),
        offered=torch.ones_like(distortion, dtype=torch.bool),
        distortion=distortion,
        agreement=(-2 * distortion).exp(),
        fraction=torch.tensor([[flops_fraction(SHAPE, pyramid, route, GRIDS, 60) for route in tree.routes]]).expand_as(
            distortion
        ),
    )
    routers = nn.ModuleList(FeaturesAreLogits() for _ in SITES)
    policy = Policy.of(routers, table)
    budgets = []
    for trade_off in (0.0, *torch.logspace(-3, 3, 25).tolist()):
        spent = outcome(table, policy.choose(trade_off))
        budgets.append(Budget(spent.fraction, trade_off, spent.distortion))
    pyramid = PyramidConfig(sites=SITES, budgets=tuple(budgets))
    pyramid = replace(pyramid, trade_off=pyramid.trade_off_for(budget))
    cases = [
        Case(samples[each.index], each, "red", "red" if each.agreement > 0.5 else "dark red")
        for each in ranked(table, policy.choose(pyramid.trade_off))
    ]
    grids = [GRIDS] * len(samples)
    settings = {"data": "mydata.json", "data_digest": "5e1f" * 16, "samples": 512, "seed": 0, "routes": "all"}
    return Report.of(policy, pyramid, SHAPE, grids, budget, cases, settings, ORIGIN)
