"""A router as the mean of several small networks that are fitted side by side.

Of few samples, every network learns something else that is wrong; their mean keeps what they agree on. The router has
no more parameters for it: its hidden units are theirs. Source: ours; the mean of networks that began apart is that of
deep ensembles, https://arxiv.org/abs/1612.01474.

Shapes: M members, B batch, D hidden, E scores.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dpn_cli.modeling.routers import RouterHead, RouterLinear, as_scores

MEMBERS = 4  # networks that share a router's hidden units out among them


class Members(nn.Module):
    """The networks that one router is made of, with fresh weights; one, where its hidden units cannot be shared out."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.output = router.config.output
        is_mlp, (num_scores, width) = router.config.kind == "mlp", router.head.weight.shape
        count = MEMBERS if is_mlp and width % MEMBERS == 0 else 1
        self.hidden = RouterLinear(router.hidden.weight.shape[1], width) if is_mlp else None
        heads = [RouterHead(width // count, num_scores) for _ in range(count)]
        self.weight = nn.Parameter(torch.stack([head.weight.detach() for head in heads]))  # [M, E, units]
        self.bias = nn.Parameter(torch.stack([head.bias.detach() for head in heads]))  # [M, E]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return what every member scores, [M, B, E], of features [B, num_inputs, D]."""
        x = features.float()
        x = x.flatten(1) if self.hidden is None else F.gelu(self.hidden(F.layer_norm(x, x.shape[-1:]).flatten(1)))
        units = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)
        return as_scores(torch.baddbmm(self.bias[:, None], units, self.weight.transpose(1, 2)), self.output)

    @torch.no_grad()
    def join(self, router: Any) -> None:
        """Make the router the mean of its members, before the function that its outputs go through."""
        router.head.weight.copy_(torch.cat(list(self.weight), dim=1) / len(self.weight))
        router.head.bias.copy_(self.bias.mean(0))
        if self.hidden is not None:
            nn.init.ones_(router.norm.weight)
            nn.init.zeros_(router.norm.bias)
            router.hidden.load_state_dict(self.hidden.state_dict())


def new_members(routers: nn.ModuleList, seed: int) -> nn.ModuleList:
    """Return fresh members of every router, where the routers are."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.ModuleList(map(Members, routers)).to(next(routers.parameters()).device)
