"""Damaged images: refused by name, whatever the damage."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpn_cli.calibration.data.faults import RowError
from dpn_cli.calibration.data.images import FORMATS, check_image, open_image
from dpn_cli.errors import DataError


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer, format=kind)
    return buffer.getvalue()


WHOLE = {kind: encoded(kind) for kind in FORMATS if kind in Image.registered_extensions().values()}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_images_pass(kind: str) -> None:
    check_image(WHOLE[kind], "x")
    assert open_image(WHOLE[kind]).size == (40, 30)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(WHOLE)), num_bytes=st.integers(1, 8))
@pytest.mark.filterwarnings("ignore")
def test_damage_is_named_before_and_after_the_scan(data: st.DataObject, kind: str, num_bytes: int) -> None:
    image = bytearray(WHOLE[kind])
    for _ in range(num_bytes):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(image[: data.draw(st.integers(0, len(image)))])
    try:
        check_image(damaged, "picture")
    except RowError as fault:
        assert fault.reason.startswith("image ") and "picture" in fault.detail
    try:
        open_image(damaged)
    except DataError as error:
        assert "no image that can be read" in str(error)
