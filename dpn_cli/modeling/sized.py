"""Attention to merged tokens: each counts as many as it stands for.

Shapes: B batch, Q queries, K keys.
"""

import torch


def log_sizes(sizes: torch.Tensor) -> torch.Tensor:
    """Return what sizes [B, K] add to the attention logits of the keys; nothing for padding, which is masked."""
    return sizes.clamp(min=1).log()


def with_sizes(causal: torch.Tensor | None, sizes: torch.Tensor, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """Add the logarithm of every key's size to its attention logits.

    Source: ToMe, https://arxiv.org/abs/2210.09461, equation 1 ("proportional attention").

    Args:
        causal: The mask to add them to: [B, 1, Q, K] bool or additive, or None where it is the plain causal one.
        sizes: [B, K] float, 0 for padding.
        queries: Q.
        dtype: Dtype of the attention logits.

    Returns:
        [B, 1, Q, K], additive.
    """
    keys = sizes.shape[1]
    if causal is None:
        causal = torch.ones(queries, keys, dtype=torch.bool, device=sizes.device).tril(keys - queries)[None, None]
    bias = log_sizes(sizes).to(dtype)[:, None, None]
    if causal.dtype == torch.bool:
        return torch.where(causal, bias, -torch.inf)
    return causal + bias
