"""The matcher: a predictor that compares every visual token with the words of the instruction.

Source: ours; text-guided selection is SparseVLM's, https://arxiv.org/abs/2410.04417.

Shapes: B batch, V visual tokens, D hidden, T text tokens, H heads, W their width.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dpn_cli.modeling.guide import normal
from dpn_cli.modeling.routers import RouterLinear
from dpn_cli.modeling.state import full_precision
from dpn_cli.pyramid.predictors import MATCHER_HEADS, MATCHER_HIDDEN, MATCHER_WIDTH

ABSENT = -1e4  # the logit of what is no token of the instruction


class Matcher(nn.Module):
    """Scores every token by how well it answers to some word of the instruction, and by itself; in float32.

    score(v) = mean over heads of log Σ_t exp(q(t)·k(v) / √W + g(t)) + MLP(v), of normalised tokens.
    """

    READS = ("queries", "gates", "keys", "hidden")  # the layers over the hidden size

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.queries = RouterLinear(hidden_size, MATCHER_HEADS * MATCHER_WIDTH)
        self.gates = RouterLinear(hidden_size, MATCHER_HEADS)
        self.keys = RouterLinear(hidden_size, MATCHER_HEADS * MATCHER_WIDTH)
        self.hidden = RouterLinear(hidden_size, MATCHER_HIDDEN)
        self.score = RouterLinear(MATCHER_HIDDEN, 1)

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
                values.unflatten(-1, (MATCHER_HEADS, MATCHER_WIDTH)).transpose(1, 2)
                for values in (self.queries(text), self.keys(tokens))
            )
            logits = queries @ keys.transpose(-1, -2) / MATCHER_WIDTH**0.5  # [B, H, T, V]
            logits = logits + self.gates(text).transpose(1, 2)[..., None]
            logits = logits.masked_fill(~is_text[:, None, :, None], ABSENT)
            own: torch.Tensor = self.score(F.gelu(self.hidden(tokens)))[..., 0]
            return logits.logsumexp(2).mean(1) + own
