"""How LLaVA-NeXT and LLaVA-OneVision cut an image of any size into tiles, and the grids that come of it. No torch.

An image is seen twice: as a whole, scaled into one tile, and as a mosaic of tiles in the resolution that fits it
best, whose padding is cut off again. Every row of the mosaic ends with a newline token.

Source: LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next), LLaVA-OneVision (arXiv:2408.03326,
section 3.2); the arithmetic is that of transformers' `pack_image_features`, to the token (tests compare).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from dpn_cli.pyramid.config import Block
from dpn_cli.pyramid.experts import Grid

# What transformers' config classes assume where image_grid_pinpoints is missing (tests compare).
RESOLUTIONS: dict[str, list[list[int]]] = {
    "llava_next": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "llava_onevision": [list(pair) for pair in product(range(384, 2305, 384), repeat=2)],
}
DEFAULT_ASPECT_RATIO = "anyres_max_9"  # likewise, of OneVision's vision_aspect_ratio


@dataclass(frozen=True)
class Tiling:
    """The tiles of a model.

    Attributes:
        pixels: side of a tile.
        tokens: side of a tile, in tokens.
        resolutions: (height, width) of the mosaics there are, in pixels.
        cuts_several: whether the images of a sample with several are cut too.
        max_tiles: a mosaic of more tokens than so many tiles have is scaled down; None for no limit.
    """

    pixels: int
    tokens: int
    resolutions: Sequence[tuple[int, int]]
    cuts_several: bool = True
    max_tiles: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], tokens: int) -> "Tiling":
        """Read the tiling from a model's config.

        Args:
            config: Model config as plain data, with its model type.
            tokens: side of a tile.

        Raises:
            KeyError, TypeError, ValueError: if the config does not say how.
        """
        family = config["model_type"].removeprefix("dpn_")
        limit = config.get("vision_aspect_ratio", DEFAULT_ASPECT_RATIO) if family == "llava_onevision" else None
        pixels = config["vision_config"]["image_size"]
        resolutions = [(tall, wide) for tall, wide in config.get("image_grid_pinpoints") or RESOLUTIONS[family]]
        if any(type(side) is not int or side < pixels for pair in resolutions for side in pair):
            raise ValueError(f"image_grid_pinpoints {resolutions} are not sizes of whole tiles of {pixels} pixels")
        return cls(
            pixels=pixels,
            tokens=tokens,
            resolutions=resolutions,
            cuts_several=family != "llava_onevision",
            max_tiles=None if limit is None else int(limit.removeprefix("anyres_max_")),
        )

    def blocks(self, height: int, width: int) -> tuple[Block, ...]:
        """Return the grids of an image: the whole, then the mosaic with the newlines of its rows.

        Of a very tall image nothing but the newlines may be left, of a very wide one not even these.

        Args:
            height: Height of the image, in pixels.
            width: Width of the image, in pixels.
        """
        rows, cols = self._mosaic(height, width)
        mosaic = tuple(grid for grid in ((rows, cols), (rows, 1)) if grid[0] * grid[1])
        whole = ((self.tokens, self.tokens),)
        return (whole, mosaic) if mosaic else (whole,)

    def blocks_beside_others(self) -> tuple[Block, ...]:
        """Return the grids of one of several images, where these are not cut: the whole and one newline."""
        return ((self.tokens, self.tokens),), ((1, 1),)

    def _mosaic(self, height: int, width: int) -> Grid:
        tall, wide = self._best_resolution(height, width)
        rows, cols = tall // self.pixels * self.tokens, wide // self.pixels * self.tokens
        if width / height > cols / rows:
            rows -= (rows - int(round(height * (cols / width), 7))) // 2 * 2
        else:
            cols -= (cols - int(round(width * (rows / height), 7))) // 2 * 2
        if self.max_tiles is not None:
            ratio = math.sqrt(rows * cols / (self.max_tiles * self.tokens**2))
            if ratio > 1.1:
                rows, cols = int(rows // ratio), int(cols // ratio)
        return rows, cols

    def _best_resolution(self, height: int, width: int) -> tuple[int, int]:
        """Return the resolution that keeps most pixels of an image, and of those the one that wastes least."""

        def fitness(resolution: tuple[int, int]) -> tuple[int, int]:
            tall, wide = resolution
            scale = min(wide / width, tall / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - tall * wide

        return max(self.resolutions, key=fitness)
