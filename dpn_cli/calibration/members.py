"""A router as the mean of several small networks, each of which is fitted by itself.

Of few samples, every network learns something else that is wrong; their mean keeps what they agree on. The router has
no more parameters for it: its hidden units are theirs. Source: ours; the mean of networks that were trained apart is
that of deep ensembles, https://arxiv.org/abs/1612.01474.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpn_cli.modeling.routers import Router

MEMBERS = 4  # networks that share a router's hidden units out among them


def num_members(router: Any) -> int:
    """Return how many networks a router is made of: one, where its hidden units cannot be shared out."""
    return MEMBERS if router.config.kind == "mlp" and len(router.hidden.bias) % MEMBERS == 0 else 1


def new_members(routers: nn.ModuleList, seed: int) -> nn.ModuleList:
    """Return a network with fresh weights for every router, with its share of the hidden units."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.ModuleList(_new_member(router) for router in routers)


def _new_member(router: Any) -> Router:
    config, num_scores = router.config, len(router.head.bias)
    width = router.norm.weight if config.kind == "mlp" else router.head.weight[0]
    hidden_ratio = config.hidden_ratio * num_members(router)
    return Router(len(width) // config.num_inputs, num_scores, replace(config, hidden_ratio=hidden_ratio))


@torch.no_grad()
def join(router: Any, members: Sequence[Any]) -> None:
    """Make a router the mean of networks, before the function that its outputs go through.

    What a member's norm scales its inputs by goes into its hidden layer, so that the norm is the same for all of them.
    """
    router.head.weight.copy_(torch.cat([each.head.weight for each in members], dim=1) / len(members))
    router.head.bias.copy_(torch.stack([each.head.bias for each in members]).mean(0))
    if router.config.kind != "mlp":
        return
    nn.init.ones_(router.norm.weight)
    nn.init.zeros_(router.norm.bias)
    router.hidden.weight.copy_(torch.cat([each.hidden.weight * each.norm.weight for each in members]))
    biases = [each.hidden.bias + each.hidden.weight @ each.norm.bias for each in members]
    router.hidden.bias.copy_(torch.cat(biases))
