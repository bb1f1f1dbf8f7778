"""FastV: after an early layer, keep the visual tokens that the last token attended to."""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dpn_cli.evaluation.baselines.attention import instruction_attention
from dpn_cli.evaluation.baselines.contender import Fixed, Prompt
from dpn_cli.evaluation.baselines.dropping import Dropping, keep_best
from dpn_cli.modeling.state import PyramidState
from dpn_cli.pyramid.config import num_tokens
from dpn_cli.pyramid.cost import DecoderShape

PAPER_K = (2, 3, 5)


@dataclass(frozen=True)
class Ranked(PyramidState):
    """A batch that also knows how its tokens rank.

    Attributes:
        scores: [B, S] as at the site that set them.
    """

    scores: torch.Tensor | None = None


@dataclass(frozen=True)
class FastV(Dropping):
    """Drops after the first K layers, by the attention that the K-th paid.

    Source: Chen et al. 2024, https://arxiv.org/abs/2403.06764, section 4.1. As there, kept tokens keep their
    positions. Ours: the attention of that layer is computed once more for one query, so that no layer needs an
    eager kernel; and the last token of the instruction is asked, also where an answer follows.

    Attributes:
        first_layers: K, the layers that see all tokens.
    """

    name: ClassVar[str] = "fastv"
    first_layers: int = 2

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.name} K={self.first_layers}"

    def candidates(self, shape: DecoderShape, prompts: Collection[Prompt], budget: float) -> list[Fixed]:
        """Return it with every K of the paper's table 1 that can spend so little."""
        found: list[Fixed] = []
        for first_layers in PAPER_K:
            with suppress(ValueError):
                found.append(replace(self, first_layers=first_layers).fit(shape, prompts, budget))
        return found or [replace(self, first_layers=PAPER_K[0]).fit(shape, prompts, budget)]

    @property
    def after_layers(self) -> tuple[int, ...]:
        """Before the K-th layer tokens are ranked, after it they are dropped."""
        return (self.first_layers - 2, self.first_layers - 1)

    def kept(self, visual_tokens: int, site: int) -> int:
        """Return how many visual tokens stay after a site: all at the first, which only ranks."""
        return visual_tokens if site == 0 else super().kept(visual_tokens, 0)

    def scores(self, text_model: Any, state: PyramidState, site: int) -> torch.Tensor:
        """Return the attention that the K-th layer is about to pay."""
        return instruction_attention(text_model, state, self.first_layers - 1)

    def reduce(self, text_model: Any, state: PyramidState, site: int) -> PyramidState:
        """Rank before the K-th layer and drop after it."""
        if site == 0:
            return Ranked(**vars(state), scores=self.scores(text_model, state, site))
        assert isinstance(state, Ranked) and state.scores is not None
        counts = [self.kept(num_tokens(grids), site) for grids in state.image_grids]
        return keep_best(state, state.scores, counts)
