"""Predictors: small networks that foresee which visual tokens an answer will need, from the tokens before the site.

Source: ours. The teacher is the attention of the whole model (see `dpn_cli.calibration.predictors`), as in
SparseVLM's text-guided selection, https://arxiv.org/abs/2410.04417; that of a single early layer overlooks much.

Shapes: B batch, S sequence, V visual tokens, D hidden, T text tokens, H heads, W their width.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dpn_cli.modeling.guide import Guide, normal
from dpn_cli.modeling.routers import RouterLinear, full_precision
from dpn_cli.modeling.state import PyramidState, take_columns
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.experts import num_tokens
from dpn_cli.pyramid.networks import PREDICTOR_HEADS, PREDICTOR_HIDDEN, PREDICTOR_WIDTH, READ_TEXT

HIDDEN = -1e4  # the logit of what is no token of the instruction


class Predictor(nn.Module):
    """Scores every token by how well it answers to some word of the instruction, and by itself; in float32.

    score(v) = mean over heads of log Σ_t exp(q(t)·k(v) / √W + g(t)) + MLP(v), of normalised tokens.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.queries = RouterLinear(hidden_size, PREDICTOR_HEADS * PREDICTOR_WIDTH)
        self.gates = RouterLinear(hidden_size, PREDICTOR_HEADS)
        self.keys = RouterLinear(hidden_size, PREDICTOR_HEADS * PREDICTOR_WIDTH)
        self.hidden = RouterLinear(hidden_size, PREDICTOR_HIDDEN)
        self.score = RouterLinear(PREDICTOR_HIDDEN, 1)

    def forward(
        self, tokens: torch.Tensor, coords: torch.Tensor, text: torch.Tensor, is_text: torch.Tensor
    ) -> torch.Tensor:
        """Score visual tokens [B, V, D] by the instruction's [B, T, D], of which some [B, T] bool are there.

        Args:
            tokens: Visual tokens.
            coords: [B, V, 3] their places, which it does not look at.
            text: Tokens of the instruction, the last one first.
            is_text: which of them a sample has.

        Returns:
            Scores [B, V].
        """
        # Every layer is called as a module, so that hooks which load its weights (offloading) run.
        with full_precision(tokens.device):
            tokens, text = normal(tokens), normal(text)
            queries, keys = (
                values.unflatten(-1, (PREDICTOR_HEADS, PREDICTOR_WIDTH)).transpose(1, 2)
                for values in (self.queries(text), self.keys(tokens))
            )
            logits = queries @ keys.transpose(-1, -2) / PREDICTOR_WIDTH**0.5  # [B, H, T, V]
            logits = logits + self.gates(text).transpose(1, 2)[..., None]
            logits = logits.masked_fill(~is_text[:, None, :, None], HIDDEN)
            own: torch.Tensor = self.score(F.gelu(self.hidden(tokens)))[..., 0]
            return logits.logsumexp(2).mean(1) + own


NETWORKS: dict[str, type[Predictor | Guide]] = {"predicted": Predictor, "guided": Guide}
"""The networks of the kinds of experts that have one."""


def new_predictors(hidden_size: int, pyramid: PyramidConfig) -> nn.ModuleDict:
    """Return fresh networks for all sites that have an expert in need of one, by their names."""
    return nn.ModuleDict({name: NETWORKS[kind](hidden_size) for name, (kind, _) in pyramid.networks.items()})


def foreseen(network: nn.Module, state: PyramidState) -> torch.Tensor:
    """Let a network score the visual tokens of a batch; return [B, S], 0 for other tokens."""
    assert state.coords is not None
    is_visual = state.coords[..., 0] >= 0
    columns, is_there = last_columns(is_visual, max(map(num_tokens, state.grids)))
    coords = take_columns(state.coords, columns).masked_fill(~is_there[..., None], -1)
    scores = network(take_columns(state.hidden_states, columns), coords, *last_text(state))
    columns, is_there = columns.to(scores.device), is_there.to(scores.device)
    spread = scores.new_zeros(is_visual.shape)
    return spread.scatter_add(1, columns, scores.masked_fill(~is_there, 0))


def last_text(state: PyramidState) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last text tokens of every sample's instruction [B, T, D], and which of them there are, [B, T] bool."""
    columns, is_there = last_columns(state.is_text, min(READ_TEXT, max(state.text_tokens)))
    return take_columns(state.hidden_states, columns), is_there


def last_columns(some: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of the last `count` of some tokens [B, S] bool, from the last one on, and which there are."""
    columns = torch.arange(some.shape[1], device=some.device).expand(some.shape).masked_fill(~some, -1)
    columns = columns.topk(max(1, count), dim=1).values
    return columns.clamp(min=0), columns >= 0
