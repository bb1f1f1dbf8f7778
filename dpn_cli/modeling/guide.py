"""The guide: a small transformer that reads a question and a picture before a large one does, and points out tokens.

A product of question and token, as `Matcher` has it, finds what the question names. A guide's tokens see each other,
so that it also finds what is written on it, or what that leads to.
Source: ours; a small model as the guide of a large one is SGL, https://arxiv.org/abs/2412.03324.

Shapes: B batch, V visual tokens, D hidden, T text tokens, N = V + T, W the guide's width.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dpn_cli.modeling.routers import RouterLinear
from dpn_cli.modeling.state import full_precision
from dpn_cli.pyramid.predictors import GUIDE_BLOCKS, GUIDE_HEADS, GUIDE_MLP, GUIDE_WAVES, guide_width

GRID_STEP = 64  # rows and columns from one grid to the next: the two longest waves tell them apart


class Guide(nn.Module):
    """A transformer over the instruction and all visual tokens, which scores the latter; in float32."""

    READS = ("tokens", "words")  # the layers over the hidden size

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        width = guide_width(hidden_size)
        self.tokens = RouterLinear(hidden_size, width)
        self.words = RouterLinear(hidden_size, width)
        self.places = RouterLinear(4 * GUIDE_WAVES, width)
        self.order = RouterLinear(2 * GUIDE_WAVES, width)
        self.blocks = nn.ModuleList(GuideBlock(width) for _ in range(GUIDE_BLOCKS))
        self.score = RouterLinear(width, 1)

    def forward(
        self, tokens: torch.Tensor, coords: torch.Tensor, text: torch.Tensor, is_text: torch.Tensor
    ) -> torch.Tensor:
        """Score visual tokens.

        Args:
            tokens: [B, V, D].
            coords: [B, V, 3] (grid, row, column) of each, -1 where a sample has fewer.
            text: [B, T, D] tokens of the instruction, the last one first.
            is_text: [B, T] bool, which of them a sample has.

        Returns:
            Scores [B, V].
        """
        count, device = tokens.shape[1], tokens.device
        coords, is_text = coords.to(device), is_text.to(device)
        is_there = torch.cat([coords[..., 0] >= 0, is_text], dim=1)[:, None, None]
        # Every layer is called as a module, so that hooks which load its weights (offloading) run.
        with full_precision(device):
            places = coords[..., 1:] + GRID_STEP * coords[..., :1]
            seen = self.tokens(normal(tokens)) + self.places(waves(places).flatten(2))
            read = self.words(normal(text)) + self.order(waves(torch.arange(text.shape[1], device=device)))
            x = torch.cat([seen, read], dim=1)
            for block in self.blocks:
                x = block(x, is_there)
            score: torch.Tensor = self.score(normal(x[:, :count]))[..., 0]
        return score


class GuideBlock(nn.Module):
    """Attention and an MLP, each on normalised values; their scale and shift are part of the next product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = RouterLinear(width, 3 * width)
        self.output = RouterLinear(width, width)
        self.up = RouterLinear(width, GUIDE_MLP * width)
        self.down = RouterLinear(GUIDE_MLP * width, width)

    def forward(self, x: torch.Tensor, is_there: torch.Tensor) -> torch.Tensor:
        """Map [B, N, W] to [B, N, W]; attention is paid to what is there, [B, 1, 1, N] bool."""
        heads = self.attention(normal(x)).unflatten(-1, (3 * GUIDE_HEADS, -1)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=is_there)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(normal(x))))


def normal(x: torch.Tensor) -> torch.Tensor:
    """Normalise vectors [..., D], in float32."""
    return F.layer_norm(x.float(), x.shape[-1:])


def waves(places: torch.Tensor) -> torch.Tensor:
    """Return sines and cosines [..., 2 · GUIDE_WAVES] of places [...], as the original transformer's encoding."""
    frequencies = torch.pi / 2 ** torch.arange(GUIDE_WAVES, device=places.device, dtype=torch.float32)
    angles = places[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
