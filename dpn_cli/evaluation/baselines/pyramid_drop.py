"""PyramidDrop: at a few depths, keep a share of the visual tokens that the last instruction token attends to."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dpn_cli.evaluation.baselines.attention import instruction_attention
from dpn_cli.evaluation.baselines.dropping import Dropping
from dpn_cli.modeling.state import PyramidState
from dpn_cli.pyramid.config import PyramidConfig


@dataclass(frozen=True)
class PyramidDrop(Dropping):
    """Drops the same share at every site, ranked by the attention of the layer after it.

    Source: Xing et al. 2024, https://arxiv.org/abs/2410.17247, section 3.2, without training. Ours: the share is
    solved for the budget where the paper takes a half; the sites are those of the pyramid that it is compared with, by
    default the paper's quarters of the depth; kept tokens keep their positions, where the authors number them anew.

    Attributes:
        sites: the layers after which tokens are dropped.
    """

    name: ClassVar[str] = "pyramiddrop"
    sites: tuple[int, ...] = ()

    @classmethod
    def beside(cls, pyramid: PyramidConfig) -> "PyramidDrop":
        """Return it with the pyramid's sites."""
        return cls(sites=tuple(site.after_layer for site in pyramid.sites))

    @property
    def after_layers(self) -> tuple[int, ...]:
        """The sites."""
        return self.sites

    def scores(self, text_model: Any, state: PyramidState, site: int) -> torch.Tensor:
        """Return the attention that the layer after the site would pay to all that is left."""
        return instruction_attention(text_model, state, self.sites[site] + 1)
