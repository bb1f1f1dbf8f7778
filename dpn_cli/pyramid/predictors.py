"""Predictors, the networks that foresee which visual tokens an answer will need: their sizes and FLOPs. No torch.

Shapes: D hidden size of the decoder.
"""

from collections.abc import Mapping

from dpn_cli.pyramid.shape import DecoderShape, Shapes

READ_TEXT = 128  # tokens of the instruction that a predictor reads, the last ones
MATCHER_HEADS, MATCHER_WIDTH, MATCHER_HIDDEN = 8, 32, 64
GUIDE_BLOCKS, GUIDE_HEADS, GUIDE_MLP = 2, 4, 2  # the last: width of the MLP, in widths of the network
GUIDE_WAVES = 8  # wavelengths of a place's encoding, from 2 tokens on, each twice the one before


def _linear(layers: Mapping[str, tuple[int, int]]) -> Shapes:
    """Return the shapes of linear layers' weights and biases, from (outputs, inputs) of each."""
    weights = {f"{name}.weight": size for name, size in layers.items()}
    return weights | {f"{name}.bias": size[:1] for name, size in layers.items()}


def matcher_tensors(hidden_size: int) -> Shapes:
    """Return the shapes of a matcher's tensors, by name."""
    outputs = {"queries": MATCHER_HEADS * MATCHER_WIDTH, "gates": MATCHER_HEADS}
    outputs |= {"keys": MATCHER_HEADS * MATCHER_WIDTH, "hidden": MATCHER_HIDDEN}
    return _linear({name: (size, hidden_size) for name, size in outputs.items()} | {"score": (1, MATCHER_HIDDEN)})


def matcher_flops(shape: DecoderShape, visual: int, text: int) -> int:
    """Count the keys and the MLP of visual tokens, the queries of the last ones of the text, and their products."""
    read, width = min(max(text, 1), READ_TEXT), MATCHER_HEADS * MATCHER_WIDTH
    own = shape.hidden_size * (width + MATCHER_HIDDEN) + MATCHER_HIDDEN + read * width
    return 2 * visual * own + 2 * read * shape.hidden_size * (width + MATCHER_HEADS)


def guide_width(hidden_size: int) -> int:
    """Return the width of a guide's tokens: a quarter of D, between 32 and 128."""
    return max(32, min(128, hidden_size // 4 // GUIDE_HEADS * GUIDE_HEADS))


def guide_tensors(hidden_size: int) -> Shapes:
    """Return the shapes of a guide's tensors, by name."""
    width = guide_width(hidden_size)
    mlp = GUIDE_MLP * width
    block = {"attention": (3 * width, width), "output": (width, width), "up": (mlp, width), "down": (width, mlp)}
    layers = {"tokens": (width, hidden_size), "words": (width, hidden_size)}
    layers |= {"places": (width, 4 * GUIDE_WAVES), "order": (width, 2 * GUIDE_WAVES), "score": (1, width)}
    layers |= {f"blocks.{i}.{name}": size for i in range(GUIDE_BLOCKS) for name, size in block.items()}
    return _linear(layers)


def guide_flops(shape: DecoderShape, visual: int, text: int) -> int:
    """Count the blocks of visual tokens and of the last ones of the text, what they are made of, and the scores."""
    read, width = min(max(text, 1), READ_TEXT), guide_width(shape.hidden_size)
    block = (4 + 2 * GUIDE_MLP) * width * width + 2 * (visual + read) * width
    made = (visual + read) * shape.hidden_size * width + (4 * visual + 2 * read) * GUIDE_WAVES * width
    return 2 * (made + GUIDE_BLOCKS * (visual + read) * block + visual * width)
