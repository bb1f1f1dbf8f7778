"""Routers: small networks that look at a sample and score the rates of one site.

Shapes: B batch, S sequence, D hidden, E experts.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from dpn_cli.modeling.pyramid_config import RouterConfig

GATE_TEMPERATURE = 10.0  # of the authors' probability gate


class Router(nn.Module):
    """LayerNorm → Linear(D, D/4) → GELU → Linear(D/4, E), or one Linear(D, E); always in float32.

    Where the router reads several vectors, each is normalised by itself. A fresh router scores every rate alike, so
    that at λ = 0 the first one, 1×1, is taken.

    Source: paper, section 3.3; the linear kind is version 2 in the authors' code.
    """

    def __init__(self, hidden_size: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        inputs = hidden_size * config.num_inputs
        if config.kind == "mlp":
            self.norm = nn.LayerNorm(inputs)
            self.hidden = nn.Linear(inputs, hidden_size // config.hidden_ratio)
            inputs = hidden_size // config.hidden_ratio
        self.head = nn.Linear(inputs, num_experts)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Score the rates.

        Args:
            features: [B, num_inputs, D].

        Returns:
            Logits [B, E] in float32. With `output: distortion`, minus the predicted distortions in nats: 0 for 1×1.
        """
        x = features.float()
        if self.config.kind == "mlp":
            x = F.layer_norm(x, x.shape[-1:], eps=self.norm.eps).flatten(1)
            x = x * self.norm.weight.float() + self.norm.bias.float()
            x = F.gelu(F.linear(x, self.hidden.weight.float(), self.hidden.bias.float()))
        x = x.flatten(1)
        z = F.linear(x, self.head.weight.float(), self.head.bias.float())
        if self.config.output == "logits":
            return z
        return torch.cat([torch.zeros_like(z[:, :1]), -F.softplus(z[:, 1:])], dim=1)


def router_features(
    hidden_states: torch.Tensor,
    columns: torch.Tensor,
    is_read: torch.Tensor,
    is_visual: torch.Tensor,
    config: RouterConfig,
) -> torch.Tensor:
    """Collect what a router reads.

    Args:
        hidden_states: [B, S, D].
        columns: [B, R], where the tokens are that the routers read: of each sample the last of the instruction, or all
            of a special kind, whose mean is taken.
        is_read: [B, R], bool; False where a sample has fewer.
        is_visual: [B, S], bool; a sample may have none.
        config: says whether the mean and the maximum of the visual tokens are wanted.

    Returns:
        [B, num_inputs, D].
    """
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)[:, None]
    read = hidden_states[rows, columns]
    last = read[:, 0]
    if columns.shape[1] > 1:
        last = (read * is_read[..., None]).sum(1) / is_read.sum(1, keepdim=True).clamp(min=1)
    if config.num_inputs == 1:
        return last[:, None]
    visual = is_visual[..., None]
    mean = (hidden_states * visual).sum(1) / visual.sum(1).clamp(min=1)
    maximum = hidden_states.masked_fill(~visual, torch.finfo(hidden_states.dtype).min).amax(1)
    maximum = maximum * visual.any(1)
    return torch.stack([last, mean.to(last.dtype), maximum], dim=1)


def decide(logits: Sequence[float], costs: Sequence[float], offered: Sequence[int], trade_off: float) -> int:
    """Return argmax_k(logit_k - λ·cost_k) over the offered experts; ties go to the first, 1×1.

    Args:
        logits: of all experts.
        costs: FLOPs fractions, aligned with `offered`.
        offered: expert indices, ascending.
        trade_off: λ, in units of the logits per unit of FLOPs fraction.

    Source: ours; with λ = 0 and `output: logits` it is the paper's argmax.
    """
    scores = [logits[k] - trade_off * cost for k, cost in zip(offered, costs, strict=True)]
    return offered[scores.index(max(scores))]
