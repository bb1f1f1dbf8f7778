"""Attention of rows of unlike lengths one after another, in the one kernel that PyTorch has for it: FlashAttention's.

Source: `torch.nn.attention.varlen`, https://docs.pytorch.org/docs/stable/nn.attention.varlen.html.

Shapes: H heads, T tokens of all rows, D head size.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

try:
    from torch.nn.attention.varlen import varlen_attn

    KERNEL: Callable[..., Any] | None = varlen_attn if "window_size" in signature(varlen_attn).parameters else None
except ImportError:  # before torch 2.10
    KERNEL = None
"""The kernel, in the form that it has since torch 2.11."""

FLASH_CAPABILITY = (8, 0)  # of the GPUs that FlashAttention runs on
HALVES = (torch.float16, torch.bfloat16)
CAUSAL = (-1, 0)  # the window of a token: all tokens before it, none after


def has_kernel(states: torch.Tensor) -> bool:
    """Say whether the kernel is there for such hidden states."""
    if KERNEL is None or not states.is_cuda or states.dtype not in HALVES:
        return False
    return (
        torch.backends.cuda.flash_sdp_enabled() and torch.cuda.get_device_capability(states.device) >= FLASH_CAPABILITY
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    """Return the causal attention output [1, H, T, D] of rows one after another.

    Args:
        query: [1, H, T, D], as are key and value.
        key: What the queries are compared with.
        value: What is averaged.
        ends: [rows + 1] int32, where the rows end, after a 0.
        longest: number of tokens of the longest row.
        scale: the factor of the logits; None for 1 / sqrt(D).
    """
    assert KERNEL is not None
    tokens = (states[0].transpose(0, 1) for states in (query, key, value))
    output: torch.Tensor = KERNEL(*tokens, ends, ends, longest, longest, scale=scale, window_size=CAUSAL)
    return output.transpose(0, 1)[None]
