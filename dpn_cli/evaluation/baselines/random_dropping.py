"""Random dropping before the first layer: the control that every method has to beat."""

import zlib
from typing import Any, ClassVar

import torch

from dpn_cli.evaluation.baselines.dropping import Dropping
from dpn_cli.modeling.state import PyramidState


class RandomDropping(Dropping):
    """Keeps visual tokens at random, before the language model.

    The draw is seeded by the text of the prompt, so that an answer depends neither on the batch nor on the run.
    """

    name: ClassVar[str] = "random"
    after_layers = (-1,)

    def scores(self, text_model: Any, state: PyramidState, site: int) -> torch.Tensor:
        """Return random numbers."""
        assert state.coords is not None and state.instruction is not None
        column = torch.arange(state.coords.shape[1], device=state.coords.device)
        is_prompt = (state.coords[..., 0] < 0) & (column <= state.instruction[:, None])
        is_prompt = is_prompt if state.valid is None else is_prompt & state.valid
        rows = []
        for hidden_states, chosen, coords in zip(state.hidden_states, is_prompt, state.coords, strict=True):
            text = hidden_states[chosen, :4].float().cpu().numpy().tobytes()  # embeddings, the same in every batch
            generator = torch.Generator().manual_seed(zlib.crc32(text))
            is_visual = coords[:, 0] >= 0
            row = torch.zeros(len(coords), device=coords.device)
            row[is_visual] = torch.rand(int(is_visual.sum()), generator=generator).to(row.device)
            rows.append(row)
        return torch.stack(rows)
