"""The grids of an image's tiles, against transformers' own packing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import LlavaNextConfig, LlavaNextModel, LlavaOnevisionConfig, LlavaOnevisionModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from dpn_cli.pyramid.config import Block
from dpn_cli.pyramid.tiling import RESOLUTIONS, Tiling

NEXT, ONEVISION = LlavaNextConfig(), LlavaOnevisionConfig()
SIDES = st.integers(1, 3000)


def packed(config: Any, height: int, width: int, patches: int | None = None) -> torch.Tensor:
    """Return what transformers packs an image into: a one for every visual token, a two for every newline, [N]."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    size = torch.tensor([[height, width]])
    count = patches or image_size_to_num_patches(size[0], config.image_grid_pinpoints, config.vision_config.image_size)
    features = [torch.ones(count, side * side, 1)]
    model, options = SimpleNamespace(config=config), {"image_newline": torch.tensor([2.0])}
    if config is NEXT:
        images, _ = LlavaNextModel.pack_image_features(model, features, size, "default", **options)
    else:
        images, _ = LlavaOnevisionModel.pack_image_features(model, features, size, **options)
    return images[0][:, 0]


def tokens(blocks: tuple[Block, ...]) -> list[float]:
    """Return the same for the grids: the whole, then rows that end with a newline."""
    assert all(height * width for block in blocks for height, width in block)
    [[(height, width)], *mosaics] = blocks
    result = [1.0] * (height * width)
    for *mosaic, (rows, _) in mosaics:
        assert all(grid[0] == rows for grid in mosaic)
        result += ([1.0] * sum(cols for _, cols in mosaic) + [2.0]) * rows
    return result


def tiling(config: Any) -> Tiling:
    return Tiling.of(config.to_dict(), config.vision_config.image_size // config.vision_config.patch_size)


@pytest.mark.parametrize("config", [NEXT, ONEVISION])
def test_resolutions_are_those_of_transformers(config: Any) -> None:
    assert [list(pair) for pair in RESOLUTIONS[config.model_type]] == config.image_grid_pinpoints


@given(height=SIDES, width=SIDES)
@example(height=900, width=5)  # a mosaic of newlines alone
@example(height=336, width=336)
@example(height=1, width=200)
@example(height=30, width=1)  # a mosaic as high as the whole, of one column or none
@pytest.mark.parametrize("config", [NEXT, ONEVISION])
def test_grids_have_the_tokens_that_transformers_packs(config: Any, height: int, width: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))  # a thinner one is refused before
    assert packed(config, height, width).tolist() == tokens(tiling(config).blocks(height, width))


def test_one_of_several_images_is_not_cut() -> None:
    assert packed(ONEVISION, 500, 300, patches=1).tolist() == tokens(tiling(ONEVISION).blocks_beside_others())
