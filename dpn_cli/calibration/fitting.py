"""Fitting routers to a route table: rate–distortion, no forward pass through the language model.

The routers learn what each route loses, wherever on it they are asked. They are fitted by the Poisson deviance: it
meets what was measured in the mean, where a fit to logarithms underestimates the tails. They stop where their decisions
are best on other samples, for budgets of every size at once. Source: ours. Tuning them for their decisions afterwards,
as a soft policy over the whole tree, only overfitted.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from dpn_cli.calibration.members import new_members
from dpn_cli.calibration.policy import Policy, outcome
from dpn_cli.calibration.rollout import RouteTable
from dpn_cli.inference.threads import one_thread, threads_for

BATCH = 64  # samples per step
EVALUATE_EVERY = 5  # epochs
TRADE_OFFS = (0.01, 5.0)  # λ, the loss that a whole prefill is worth: from little loss for much compute to the reverse
NUM_TRADE_OFFS = 12  # values of λ that early stopping looks at
WEIGHT_DECAY = 0.1
LEARNING_RATE, WIDTH = 3e-3, 128  # the rate for a hidden size; it falls with one over the size


def spread_of_trade_offs(count: int) -> torch.Tensor:
    """Return λ of every size that matters, [count], from the smallest to the largest."""
    low, high = TRADE_OFFS
    return low * (high / low) ** torch.linspace(0, 1, count)


def fit_routers(
    routers: nn.ModuleList,
    table: RouteTable,
    holdout: RouteTable,
    epochs: int,
    learning_rate: float | None,
    seed: int,
    advance: Callable[[int], None] = lambda epochs: None,
) -> None:
    """Fit routers in place; what they were before does not count.

    Args:
        routers: one per site, which predict losses.
        table: the samples to fit, with their losses.
        holdout: other samples, for early stopping; likewise.
        epochs: passes over the samples.
        learning_rate: AdamW's, falling to zero as a cosine; None for one that suits the model's width.
        seed: random seed for the first weights and the order of the samples.
        advance: called after every epoch.
    """
    rate = learning_rate or LEARNING_RATE * WIDTH / table.hidden_size
    networks: Any = new_members(routers, seed)
    order = torch.Generator().manual_seed(seed)
    _start_at_the_mean(networks, table)
    optimizer = torch.optim.AdamW(networks.parameters(), rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, weights = math.inf, routers.state_dict()
    for epoch in range(1, epochs + 1):
        with threads_for(table.hidden_size):
            for rows in _minibatches(len(table.distortion), order):
                loss = _poisson_deviance(Policy.of(networks, table.select(rows)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        schedule.step()
        advance(1)
        if epoch % EVALUATE_EVERY == 0 or epoch == epochs:
            for members, router in zip(networks, routers, strict=True):
                members.join(router)
            objective = held_out_objective(routers, holdout)
            if objective < best:
                best, weights = objective, deepcopy(routers.state_dict())
    routers.load_state_dict(weights)


def held_out_objective(routers: nn.ModuleList, table: RouteTable) -> float:
    """Return loss + λ·FLOPs of the routers' choices over the best fixed route's, the mean over λ of every size.

    1 is no better than the best fixed route.
    """
    with torch.no_grad():
        policy = Policy.of(routers, table)
    ratios = []
    with one_thread():
        for trade_off in spread_of_trade_offs(NUM_TRADE_OFFS).tolist():
            taken = outcome(table, policy.choose(trade_off))
            fixed = _best_fixed(table, trade_off)
            ratios.append((taken.distortion + trade_off * taken.fraction) / fixed)
    return sum(ratios) / len(ratios)


def _start_at_the_mean(networks: nn.ModuleList, table: RouteTable) -> None:
    """Let every untrained member of every router predict the mean losses, so that the fit starts near them."""
    means = table.distortion.nanmean(0).nan_to_num(1.0)  # [R]
    for members in networks:
        bias = members.get_parameter("bias")
        start = means if table.tree.is_listed else (means.mean() / len(networks)).expand(bias.shape[1])
        start = start.clamp(min=1e-4)
        with torch.no_grad():
            bias.copy_(start + (-(-start).expm1()).log())  # the inverse of softplus


def _minibatches(count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    yield from torch.randperm(count, generator=generator).split(BATCH)


def _poisson_deviance(policy: Policy) -> torch.Tensor:
    """Return the mean of pred - loss·log pred over the measured routes that pool, summed over the members."""
    predicted, distortion = policy.predictions()
    predicted = predicted.clamp(min=1e-8)
    return (predicted - distortion * predicted.log()).mean(-1).sum()


def _best_fixed(table: RouteTable, trade_off: float) -> float:
    """Return loss + λ·FLOPs of the best fixed route."""
    distortion, fraction = table.distortion.nanmean(0).nan_to_num(torch.inf), table.fraction.mean(0)
    return (distortion + trade_off * fraction).min().item()
