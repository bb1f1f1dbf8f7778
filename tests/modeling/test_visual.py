"""Where visual tokens stand, and what is said when they do not."""

import pytest
import torch

from dpn_cli.modeling.visual import visual_coordinates


def test_every_samples_grids_are_numbered_from_zero() -> None:
    """Three samples: two images, none, one; each image is 1×2 or 2×1."""
    is_image = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
    text = [-1, -1, -1]
    expected = [
        [[0, 0, 0], [0, 0, 1], text, [1, 0, 0], [1, 1, 0]],
        [text] * 5,
        [text, [0, 0, 0], [0, 0, 1], text, text],
    ]
    assert visual_coordinates(is_image, [((1, 2),), ((2, 1),), ((1, 2),)]).tolist() == expected


def test_placeholders_that_do_not_fit_the_images_are_refused() -> None:
    with pytest.raises(ValueError, match="3 image tokens, its images have 4"):
        visual_coordinates(torch.tensor([[True, True, True]]), [((2, 2),)])


def test_rows_of_a_block_follow_one_another() -> None:
    """A whole of one column, and a mosaic of one column with its newlines: only the latter two share their rows."""
    coords = visual_coordinates(torch.ones(1, 6, dtype=torch.bool), [((2, 1),), ((2, 1), (2, 1))])
    assert coords[0].tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [2, 0, 0], [1, 1, 0], [2, 1, 0]]
