"""A KV cache whose layers hold different numbers of tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache
from typing_extensions import override

from dpn_cli.modeling.packing import Packing


class PyramidCache(DynamicCache):
    """A `DynamicCache` that also knows, per segment of the pyramid, what its keys stand for.

    The layers of one segment (between two sites) hold the same tokens, so one mask serves them all. A mask is [B, K]:
    bool, whether a key is no padding, or float, how many tokens it stands for; None while every key stands for one.
    """

    def __init__(self, config: PreTrainedConfig, num_segments: int, offloading: bool = False) -> None:
        super().__init__(config=config, offloading=offloading)
        self.masks: list[torch.Tensor | None] = [None] * num_segments
        self.lengths = [0] * num_segments
        self._packing: Packing | None = None

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens that a layer holds; by default those before any reduction, which generation counts."""
        return super().get_seq_length(layer_idx) if layer_idx else self.lengths[0]

    @override
    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the tokens that a layer holds, which its mask begins after."""
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def extend(self, segment: int, mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
        """Append a chunk's mask to a segment's and return the mask over all its keys.

        Args:
            segment: Index of the segment.
            mask: [B, S] of the chunk, or None when all of it stands for one token each.
            batch: Batch size B.
            length: Sequence length S.
        """
        old, past = self.masks[segment], self.lengths[segment]
        self.lengths[segment] = past + length
        if old is None and mask is None:
            return None
        device = mask.device if mask is not None else old.device  # type: ignore[union-attr]
        old = torch.ones(batch, past, dtype=torch.bool, device=device) if old is None else old
        new = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask
        self.masks[segment] = torch.cat([old, new], dim=1)
        return self.masks[segment]

    @contextmanager
    def laying_out(self, packing: Packing) -> Iterator[None]:
        """For the duration, lay out the keys and values of packed rows that `update` is given."""
        self._packing = packing
        try:
            yield
        finally:
            self._packing = None

    @override
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a chunk's keys and values to a layer, and return all that it holds.

        They are [B, heads, S, head size], or of packed rows [1, heads, T, head size]; see `laying_out`.
        """
        if self._packing is not None:
            key_states, value_states = map(self._packing.lay_out_heads, (key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def num_valid(self, segment: int) -> int | torch.Tensor:
        """Return how many tokens that are not padding a segment holds: one number, or [B, 1]."""
        mask = self.masks[segment]
        return self.lengths[segment] if mask is None else (mask > 0).sum(1, keepdim=True)

    def _map_masks(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.masks = [None if mask is None else change(mask) for mask in self.masks]

    @override
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the samples for beam search."""
        super().reorder_cache(beam_idx)
        self._map_masks(lambda mask: mask.index_select(0, beam_idx.to(mask.device)))

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        self._map_masks(lambda mask: mask.repeat_interleave(repeats, dim=0))

    @override
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these samples."""
        super().batch_select_indices(indices)
        self._map_masks(lambda mask: mask[indices])

    @override
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of every layer: -n removes n of them."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.lengths = [length + tokens_to_remove for length in self.lengths]
            self._map_masks(lambda mask: mask[:, :tokens_to_remove])

    @override
    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.masks = [None] * len(self.masks)
        self.lengths = [0] * len(self.lengths)
