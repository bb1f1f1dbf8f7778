"""What a pyramid's prefill costs: exact FLOPs, from the decoder's shape and the token counts along a route.

A multiplication and an addition are two operations, as in `torch.utils.flop_counter`, which counts the same on a
real forward (tests/pyramid/test_cost.py). Counted: the projections, the attention products and the MLP of every decoder
layer, plus the routers and the choice of tokens. Attention is counted as the full S×S product, which is what eager and
SDPA kernels without causal skipping compute. Left out, as the counter leaves it out: norms, softmax, activations,
rotary embeddings and pooling. The vision tower, the projector and `lm_head` belong to the original and the pyramid
alike, and are reported apart.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

from dpn_cli.pyramid.config import Option, PyramidConfig, Route
from dpn_cli.pyramid.experts import Grid, num_tokens
from dpn_cli.pyramid.shape import DecoderShape

Offer = tuple[tuple[Option, ...], tuple[float, ...]]  # what a sample can be given at a site, and what each costs


def router_flops(shape: DecoderShape, pyramid: PyramidConfig, site: int) -> int:
    """Return the FLOPs of one routing decision."""
    tensors = pyramid.router.tensors(shape.hidden_size, pyramid.num_scores(site))
    return 2 * sum(math.prod(size) for size in tensors.values() if len(size) == 2)


def tokens_per_layer(
    shape: DecoderShape, pyramid: PyramidConfig, route: Route, grids: Sequence[Grid], text_tokens: int
) -> list[int]:
    """Return the prefill tokens of every decoder layer along `route`."""
    stages = pyramid.walk(route, grids)
    counts = [text_tokens + num_tokens(stage) for stage in stages]
    return [count for count, layers in zip(counts, pyramid.segments(shape.num_layers), strict=True) for _ in layers]


def flops_fraction(
    shape: DecoderShape, pyramid: PyramidConfig, route: Route, grids: Sequence[Grid], text_tokens: int
) -> float:
    """Return the prefill FLOPs along `route` as a fraction of the original decoder's.

    Routers and the choice of tokens are included. A sample without an image costs 1.0: nothing is reduced and no router
    is asked.
    """
    stages = pyramid.walk(route, grids)
    counts = [text_tokens + num_tokens(stage) for stage in stages]
    segments = pyramid.segments(shape.num_layers)
    routed = sum(len(layers) * shape.layer_flops(n) for layers, n in zip(segments, counts, strict=True))
    for expert, stage in zip(pyramid.experts(route), stages, strict=False):
        routed += expert.flops(shape, stage, text_tokens) if pyramid.takes(stage) else 0
    if grids and pyramid.has_routers:
        routed += sum(router_flops(shape, pyramid, site) for site in range(len(pyramid.sites)))
    return routed / (shape.num_layers * shape.layer_flops(counts[0]))


@lru_cache(maxsize=8192)
def offer(
    shape: DecoderShape, pyramid: PyramidConfig, taken: Route, grids: tuple[Grid, ...], text_tokens: int
) -> Offer:
    """Return what a sample can be given at its next site, and the FLOPs fraction of each option.

    A prefill asks for every sample at every site, and samples of a size are many: the answer is kept.

    Args:
        shape: Shape of the decoder.
        pyramid: The pyramid.
        taken: Experts that the sample has taken so far.
        grids: Visual grids of the sample before any reduction; none where it has no image.
        text_tokens: Number of tokens of its prompt that are not visual.
    """
    options = tuple(pyramid.options(taken, grids)) if grids else (Option(0, 0, pyramid.full_route),)
    if len(options) == 1:  # where the mask hides a whole row there is no text either, and no cost
        return options, (1.0,)
    return options, tuple(flops_fraction(shape, pyramid, option.route, grids, text_tokens) for option in options)
