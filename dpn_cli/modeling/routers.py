"""Routers: small networks that look at a sample and score what one site can lead to.

Shapes: B batch, S sequence, D hidden, E scores (experts of the site, or routes of the pyramid).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import nn
from torch.nn import functional as F

from dpn_cli.modeling.state import full_precision
from dpn_cli.pyramid.config import ROUTER_INPUTS, Option, PyramidConfig, RouterConfig

GATE_TEMPERATURE = 10.0  # of the authors' probability gate


class RouterLinear(nn.Module):
    """A linear layer that computes in float32 and stays as it is.

    It is no `nn.Linear`, because quantisers and adapter libraries replace or wrap every one of those that they find.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return F.linear(x, self.weight.float(), self.bias.float())


class RouterHead(RouterLinear):
    """A router's last layer; a model starts it at zero, so that a fresh router scores all experts alike."""


class RouterNorm(nn.Module):
    """Normalises several vectors, each by itself, and scales them together."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(in_features))
        self.bias = nn.Parameter(torch.zeros(in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, n, D] to [B, n·D]."""
        x = F.layer_norm(x, x.shape[-1:]).flatten(1)
        return x * self.weight.float() + self.bias.float()


class Router(nn.Module):
    """LayerNorm → Linear(D, D/4) → GELU → Linear(D/4, E), or one Linear(D, E); always in float32.

    Where the router reads several vectors, each is normalised by itself. A fresh router scores every expert alike,
    so that at λ = 0 the first one, which keeps all tokens, is taken.

    Source: paper, section 3.3; the linear kind is version 2 in the authors' code.
    """

    def __init__(self, hidden_size: int, num_scores: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        inputs = hidden_size * config.num_inputs
        if config.kind == "mlp":
            self.norm = RouterNorm(inputs)
            self.hidden = RouterLinear(inputs, hidden_size // config.hidden_ratio)
            inputs = hidden_size // config.hidden_ratio
        self.head = RouterHead(inputs, num_scores)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Score the experts or routes.

        Args:
            features: [B, num_inputs, D].

        Returns:
            Logits [B, E] in float32. Unless `output` is `logits`, minus the predicted losses, 0 for the first.
        """
        x = features.float()
        # Every layer is called as a module, so that hooks which load its weights (offloading) run.
        with full_precision(x.device):
            x = F.gelu(self.hidden(self.norm(x))) if self.config.kind == "mlp" else x.flatten(1)
            z: torch.Tensor = self.head(x)
        return as_scores(z, self.config.output)


def as_scores(z: torch.Tensor, output: str) -> torch.Tensor:
    """Return the scores [..., E] of what a router's last layer puts out, [..., E]; see `RouterConfig`."""
    if output == "logits":
        return z
    return torch.cat([torch.zeros_like(z[..., :1]), -F.softplus(z[..., 1:])], dim=-1)


@dataclass(frozen=True)
class Readable:
    """What routers may read of a batch between two segments.

    Attributes:
        hidden_states: [B, S, D].
        read: [B, S] bool, the last token of the instruction, or all tokens of a special kind.
        text: [B, S] bool, the prompt's tokens that are not visual.
        visual: [B, S] bool; a sample may have none.
    """

    hidden_states: torch.Tensor
    read: torch.Tensor
    text: torch.Tensor
    visual: torch.Tensor


def _means(hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the means [B, n, D] of some tokens, [B, n, S] bool, of states [B, S, D]; zero where there is none."""
    weights = tokens.float() / tokens.sum(-1, keepdim=True).clamp(min=1)
    with full_precision(weights.device):
        return (weights @ hidden_states.float()).to(hidden_states.dtype)


def _maxima(hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the maxima [B, n, D] of some tokens, [B, n, S] bool, of states [B, S, D]; zero where there is none."""
    lowest = torch.finfo(hidden_states.dtype).min
    return hidden_states[:, None].masked_fill(~tokens[..., None], lowest).amax(2) * tokens.any(-1, keepdim=True)


ROUTER_VECTORS: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "read": ("read", _means),
    "text_mean": ("text", _means),
    "visual_mean": ("visual", _means),
    "visual_max": ("visual", _maxima),
}
"""The vectors that `ROUTER_INPUTS` are made of: the tokens of a `Readable`, and how many become one."""


def router_features(batch: Readable, config: RouterConfig) -> torch.Tensor:
    """Collect what a router reads, [B, num_inputs, D], vectors of a kind that follow each other in one go."""
    vectors = [ROUTER_VECTORS[name] for name in ROUTER_INPUTS[config.input]]
    found = []
    for reduce, group in groupby(vectors, key=itemgetter(1)):
        tokens = torch.stack([getattr(batch, name) for name, _ in group], dim=1)
        found.append(reduce(batch.hidden_states, tokens))
    return torch.cat(found, dim=1)


def trusted(logits: torch.Tensor, mean_losses: Sequence[float], trust: float) -> torch.Tensor:
    """Shrink predicted losses towards their means: where routing does not pay, all take the best route for all.

    Args:
        logits: [B, E] minus the predicted losses.
        mean_losses: [E] as calibration has measured them; empty to leave the predictions as they are.
        trust: 1 for the predictions, 0 for the means.
    """
    if trust == 1 or not mean_losses:
        return logits
    return trust * logits - (1 - trust) * logits.new_tensor(mean_losses)


def decide(scores: Sequence[float], options: Sequence[Option], costs: Sequence[float], trade_off: float) -> int:
    """Return the expert of the option with the largest score - λ·cost; ties go to the first, which keeps all.

    Args:
        scores: Scores of the router: minus the predicted losses.
        options: Options that are offered.
        costs: FLOPs fractions of the options.
        trade_off: λ, in units of the scores per unit of FLOPs fraction.

    Source: ours; with λ = 0 and `output: logits` it is the paper's argmax.
    """
    values = [scores[option.score] - trade_off * cost for option, cost in zip(options, costs, strict=True)]
    return options[values.index(max(values))].expert


def new_routers(hidden_size: int, pyramid: PyramidConfig) -> nn.ModuleList:
    """Return a fresh router for every site of a pyramid."""
    sites = range(len(pyramid.sites))
    return nn.ModuleList(Router(hidden_size, pyramid.num_scores(site), pyramid.router) for site in sites)
