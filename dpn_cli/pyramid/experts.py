"""Experts: the ways to leave a sample with fewer visual tokens, their names, settings and arithmetic. No torch.

An expert is written as its kind and its settings: `keep`, `pool:1x2` (or `1x2`), `diverse:0.25`,
`attended:0.25+4x4`, `exit`. How many tokens it leaves follows from a sample's grids alone, so that the cost of a route
is exact before it runs. Which tokens these are is the business of `dpn_cli.modeling.experts`, kind by kind.

A *selection* keeps a share of the visual tokens and leaves no grid: afterwards its tokens count as one column, which
cannot be pooled. Newline tokens are selected among like all others, so that the count stays exact.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpn_cli.pyramid.predictors import guide_flops, guide_tensors, matcher_flops, matcher_tensors
from dpn_cli.pyramid.shape import DecoderShape, Shapes

Rate = tuple[int, int]  # (kernel_h, kernel_w); the stride equals the kernel
Grid = tuple[int, int]  # (H, W) visual tokens
Rounding = Literal["ceil", "floor"]

PIVOTS = 4  # tokens that others are compared with as duplicates
CONTEXTUAL = 10 / 64  # of the tokens that VisionZip keeps, as in the authors' settings
BLOCK = 8  # side of the largest block of the image in which tokens are compared with each other
_SHARE, _CELLS = r"0?\.\d+", r"\d+[x×]\d+"
_SETTINGS = re.compile(rf"(?P<share>{_SHARE})?\+?(?P<cells>{_CELLS})?")
_EXAMPLES = {"": "", "share": ":0.25", "cells": ":2x2", "share+cells": ":0.25+4x4"}


@dataclass(frozen=True)
class Kind:
    """What all experts of a kind have in common.

    Attributes:
        settings: the forms that its settings may take: `share`, `cells`, `share+cells`, or empty for none.
        flops: Cost of choosing, from the decoder's shape and the numbers of visual and text tokens.
        reads_instruction: whether it looks at the instruction.
        reads_salience: whether it looks at what the vision tower attends to.
        predictor_tensors: Shapes of the tensors of the network that it scores tokens with, which calibration fits to
            the model, from D; None for no such network.
        about: Description in a phrase, for help texts and docs.
        source: Paper or URL that describes it.
    """

    settings: tuple[str, ...]
    about: str
    source: str
    flops: Callable[[DecoderShape, int, int], int] = lambda shape, visual, text: 0
    reads_instruction: bool = False
    reads_salience: bool = False
    predictor_tensors: Callable[[int], Shapes] | None = None


def _attention_flops(shape: DecoderShape, visual: int, text: int) -> int:
    """The keys of all tokens, the query of one, and their products."""
    keys, query = shape.num_kv_heads * shape.head_dim, shape.num_heads * shape.head_dim
    return 2 * (visual + text) * (shape.hidden_size * keys + query) + 2 * shape.hidden_size * query


def _block_flops(shape: DecoderShape, visual: int, text: int) -> int:
    """The similarities of all pairs of visual tokens inside a block, of the largest size, and to their mean."""
    return 2 * visual * (min(visual, BLOCK * BLOCK) + 1) * shape.hidden_size


def _pairs_flops(shape: DecoderShape, visual: int, text: int) -> int:
    """The similarities of all pairs of tokens, and to the mean."""
    return 2 * (visual + text) ** 2 * shape.hidden_size + _mean_flops(shape, visual, text)


def _pivot_flops(shape: DecoderShape, visual: int, text: int) -> int:
    """The similarity of every token to the pivots."""
    return PIVOTS * _mean_flops(shape, visual, text)


def contextual(selected: int) -> int:
    """Return how many of the tokens that VisionZip keeps are those that it merges the rest into."""
    return round(selected * CONTEXTUAL)


def _contextual_flops(shape: DecoderShape, visual: int, text: int) -> int:
    """The similarity of every token to the contextual ones, as many as if all tokens were kept."""
    return contextual(visual) * _mean_flops(shape, visual, text)


def _mean_flops(shape: DecoderShape, visual: int, text: int) -> int:
    """The similarity of every token to one other vector."""
    return 2 * (visual + text) * shape.hidden_size


_DIVPRUNE, _CDPRUNER = "DivPrune, https://arxiv.org/abs/2503.02175", "CDPruner, https://arxiv.org/abs/2506.10967"
_SCOPE, _DART = "SCOPE, https://arxiv.org/abs/2510.24214", "DART, https://arxiv.org/abs/2502.11494"
_VISIONZIP = "VisionZip, https://arxiv.org/abs/2412.04467"
_PYRAMIDDROP = "PyramidDrop, https://arxiv.org/abs/2410.17247"
SELECTS = ("share", "share+cells")
"""The settings of a selection whose rest goes or, with cells, is merged into one token a cell."""

KINDS: dict[str, Kind] = {
    "keep": Kind(("",), "all visual tokens stay", "paper, section 3.2"),
    "pool": Kind(("cells",), "every cell of a grid becomes one token, its mean", "paper, section 3.2"),
    "pick": Kind(("cells",), "of every cell the token that stands out most stays as it is", "ours", _mean_flops),
    "diverse": Kind(SELECTS, "the tokens that differ most from each other stay", _DIVPRUNE, _block_flops),
    "attended": Kind(
        SELECTS,
        "the tokens that the last token of the instruction attends to stay",
        _PYRAMIDDROP,
        _attention_flops,
        reads_instruction=True,
    ),
    "predicted": Kind(
        SELECTS,
        "the tokens stay that a small network, which calibration fits, foresees the answer will need",
        "ours; SparseVLM, https://arxiv.org/abs/2410.04417",
        matcher_flops,
        reads_instruction=True,
        predictor_tensors=matcher_tensors,
    ),
    "guided": Kind(
        SELECTS,
        "the tokens stay that a small transformer, which calibration fits, foresees the answer will need",
        "ours; a small model as the guide of a large one: SGL, https://arxiv.org/abs/2412.03324",
        guide_flops,
        reads_instruction=True,
        predictor_tensors=guide_tensors,
    ),
    "exit": Kind(("",), "no visual token stays", "ours; HiDrop, https://arxiv.org/abs/2602.23699"),
    "divprune": Kind(("share",), "as diverse, but chosen one by one over the whole picture", _DIVPRUNE, _pairs_flops),
    "relevant": Kind(
        SELECTS,
        "of twice as many diverse tokens, those that the instruction attends to stay",
        _CDPRUNER,
        lambda shape, visual, text: _block_flops(shape, visual, text) + _attention_flops(shape, visual, text),
        reads_instruction=True,
    ),
    "salient": Kind(SELECTS, "the tokens that the vision tower attends to stay", _VISIONZIP, reads_salience=True),
    "visionzip": Kind(
        ("share",),
        "as salient, but some of the tokens that stay are means of the rest",
        _VISIONZIP,
        _contextual_flops,
        reads_salience=True,
    ),
    "covering": Kind(SELECTS, "the tokens that the others are most similar to stay", _SCOPE, _block_flops),
    "distinct": Kind(("share",), "the tokens least similar to a few pivots stay", _DART, _pivot_flops),
    "random": Kind(("share",), "random tokens stay; a control", "UniPruneBench, https://arxiv.org/abs/2511.02650"),
    "stride": Kind(("share",), "evenly spaced tokens stay; a control", "ours"),
}
"""The kinds of experts; `dpn_cli.modeling.experts` has an assignment for each."""


@dataclass(frozen=True)
class Expert:
    """A way to leave a sample with fewer visual tokens.

    Attributes:
        kind: one of `KINDS`.
        share: the share of the visual tokens that a selection keeps.
        cells: (rows, columns) of the cells of a grid that are reduced to one token each.
    """

    kind: str
    share: float | None = None
    cells: Rate | None = None

    @classmethod
    def parse(cls, text: str) -> "Expert":
        """Read an expert from its name, as in `pool:1x2`; `1x2` is short for that, and `1x1` for `keep`.

        Raises:
            ValueError: if there is none of this name, or none with these settings.
        """
        kind, colon, settings = text.strip().partition(":")
        if not colon and re.fullmatch(_CELLS, kind):
            kind, settings = "pool", kind
        if kind not in KINDS:
            raise ValueError(f"{text!r} is not an expert: expected one of {', '.join(examples())}")
        match = _SETTINGS.fullmatch(settings)
        share = float(match["share"]) if match and match["share"] else None
        cells = _kernel(match["cells"]) if match and match["cells"] else None
        form = "+".join(name for name, value in (("share", share), ("cells", cells)) if value is not None)
        if match is None or form not in KINDS[kind].settings or share == 0 or (cells and min(cells) < 1):
            wanted = " or ".join(f"{kind}{_EXAMPLES[form]}" for form in KINDS[kind].settings)
            raise ValueError(f"{text!r} is not an expert: expected {wanted}")
        return KEEP if kind == "pool" and cells == (1, 1) else cls(kind, share, cells)

    def __str__(self) -> str:
        """Return its name; the inverse of `parse`."""
        share = "" if self.share is None else f"{self.share:.6f}".rstrip("0")
        cells = "" if self.cells is None else "{}x{}".format(*self.cells)
        settings = "+".join(part for part in (share, cells) if part)
        return f"{self.kind}:{settings}" if settings else self.kind

    def left(self, grids: Sequence[Grid], rounding: Rounding = "ceil") -> tuple[Grid, ...]:
        """Return the grids that are left of a sample's: one column after a selection, none after `exit`."""
        if self.kind == "keep":
            return tuple(grids)
        if self.kind == "exit" or not grids:
            return ()
        if self.share is None:
            assert self.cells is not None
            return tuple(pool_grid(grid, self.cells, rounding) for grid in grids)
        return ((self.selected(grids) + self.merged(grids), 1),)

    def selected(self, grids: Sequence[Grid]) -> int:
        """Return how many visual tokens a selection lets stay as they are: at least one."""
        assert self.share is not None
        total = num_tokens(grids)
        return max(1, min(int(self.share * total + 0.5), total - self.merged(grids)))

    def merged(self, grids: Sequence[Grid]) -> int:
        """Return how many tokens the rest is merged into: one for each cell, where there are cells."""
        if self.share is None or self.cells is None:
            return 0
        return num_tokens(pool_grid(grid, self.cells, "ceil") for grid in grids)

    def is_offered(self, grids: Sequence[Grid], min_visual_tokens: int, rounding: Rounding = "ceil") -> bool:
        """Say whether a sample with these grids can be given to the expert."""
        if self.kind == "keep":
            return True
        if self.kind == "exit":
            return bool(grids)
        pictures = pictures_of(grids)
        if self.share is None:
            return bool(pictures) and min(num_tokens(self.left([g], rounding)) for g in pictures) >= min_visual_tokens
        left = num_tokens(self.left(grids))
        return min_visual_tokens <= left < num_tokens(grids) and (self.cells is None or bool(pictures))

    def flops(self, shape: DecoderShape, grids: Sequence[Grid], text_tokens: int) -> int:
        """Return what it costs to choose the tokens of a sample."""
        return KINDS[self.kind].flops(shape, num_tokens(grids), text_tokens)


KEEP = Expert("keep")


def pool(*rates: Rate) -> tuple[Expert, ...]:
    """Return the experts that pool at some rates; 1×1 keeps all."""
    return tuple(KEEP if rate == (1, 1) else Expert("pool", cells=rate) for rate in rates)


def examples() -> list[str]:
    """Return an expert of every kind and form, as users write them."""
    return [f"{name}{_EXAMPLES[form]}" for name, kind in KINDS.items() for form in kind.settings]


def known_kind(name: str) -> str:
    """Return the name of a kind.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in KINDS:
        raise ValueError(f"{name!r} is not a kind of expert: expected one of {', '.join(KINDS)}")
    return name


def num_tokens(grids: Iterable[Grid]) -> int:
    """Return the visual tokens of some grids together."""
    return sum(height * width for height, width in grids)


def pictures_of(grids: Sequence[Grid]) -> list[Grid]:
    """Return the grids of more than one column: neither newlines, nor what a selection has left."""
    return [grid for grid in grids if grid[1] > 1]


def kernel_on(grid: Grid, rate: Rate) -> Rate:
    """Return the kernel of a rate on a grid: a column, such as that of newlines, is not narrowed."""
    return (rate[0], 1) if grid[1] == 1 else rate


def pool_grid(grid: Grid, rate: Rate, rounding: Rounding) -> Grid:
    """Return the size of a grid whose cells become one token each."""
    height, width = (
        -(-n // k) if rounding == "ceil" else n // k for n, k in zip(grid, kernel_on(grid, rate), strict=True)
    )
    return height, width


def _kernel(text: str) -> Any:
    return tuple(map(int, re.split("[x×]", text)))
