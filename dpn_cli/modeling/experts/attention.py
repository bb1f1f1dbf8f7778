"""The attention that some tokens pay, of one layer and computed apart: the model keeps its kernels.

Shapes: B batch, S sequence, Q queries, D hidden, G key-value heads, R query heads per key-value head, d head size.
"""

from typing import Any

import torch
from transformers.models.llama.modeling_llama import rotate_half

from dpn_cli.families.text import TEXT_MODELS
from dpn_cli.modeling.sized import log_sizes
from dpn_cli.modeling.state import PyramidState, precise, take_columns


def instruction_attention(text_model: Any, state: PyramidState, layer_idx: int) -> torch.Tensor:
    """Return the attention [B, S] from the last instruction token to all tokens, the mean over the heads.

    Args:
        text_model: Text model with a pyramid.
        state: the input of the layer.
        layer_idx: the layer whose attention it is.
    """
    assert state.instruction is not None
    last = state.now_at(state.instruction[:, None])
    return attention_from(text_model, state, layer_idx, last).mean((1, 2, 3))


def attention_from(text_model: Any, state: PyramidState, layer_idx: int, columns: torch.Tensor) -> torch.Tensor:
    """Return the attention [B, G, R, Q, S] from the tokens in some columns [B, Q] to all tokens, of every head.

    The other arguments are those of `instruction_attention`.
    """
    layer = text_model.layers[layer_idx]
    attention, head_dim = layer.self_attn, text_model.shape.head_dim
    hidden_states = layer.input_layernorm(state.hidden_states)
    cos, sin = text_model.rotary_emb(hidden_states, position_ids=state.positions)  # [B, S, d]

    keys = attention.k_proj(hidden_states).unflatten(-1, (-1, head_dim))  # [B, S, G, d]
    queries = attention.q_proj(take_columns(hidden_states, columns)).unflatten(-1, (-1, head_dim))  # [B, Q, G * R, d]
    if TEXT_MODELS[text_model.config.model_type].head_norms:
        keys, queries = attention.k_norm(keys), attention.q_norm(queries)
    keys, queries = _rotate(keys, cos, sin), _rotate(queries, take_columns(cos, columns), take_columns(sin, columns))
    queries = queries.unflatten(2, (keys.shape[2], -1))  # [B, Q, G, R, d]
    logits = precise(torch.einsum("bqgrd,bsgd->bgrqs", queries, keys)) * attention.scaling

    if state.sizes is not None:
        logits = logits + log_sizes(state.sizes)[:, None, None, None]
    visible = torch.arange(keys.shape[1], device=columns.device) <= columns[..., None]  # [B, Q, S]
    visible = visible if state.valid is None else visible & state.valid[:, None]
    return logits.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)


def _rotate(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to [B, S, heads, d]."""
    return values * cos[:, :, None] + rotate_half(values) * sin[:, :, None]
