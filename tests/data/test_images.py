"""Images: upright, within one limit for all readers, and refused by name if damaged, whatever the damage."""

import io
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageChops

from dpn_cli.data import images
from dpn_cli.data.faults import RowError
from dpn_cli.data.images import FORMATS, check_image, halved, image_size, most_pixels, open_image
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.errors import DataError
from dpn_cli.limits import MAX_PIXELS
from dpn_cli.pages.rendering import thumbnails


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer, format=kind)
    return buffer.getvalue()


WHOLE = {kind: encoded(kind) for kind in FORMATS if kind in Image.registered_extensions().values()}


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_images_pass(kind: str) -> None:
    check_image(WHOLE[kind], "x")
    assert open_image(WHOLE[kind], "x").size == (40, 30)


@settings(max_examples=100, deadline=None)
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
        open_image(damaged, "picture")
    except DataError as error:
        assert "picture" in str(error)


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")])
def test_16_bits_of_grey_are_scaled_to_8(mode: str, kind: str) -> None:
    image, buffer = Image.new("I", (2, 1), 65535), io.BytesIO()
    image.putpixel((0, 0), 20000)
    image.convert(mode).save(buffer, format=kind)
    shown = open_image(buffer.getvalue(), "x")
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(77, 77, 77), (255, 255, 255)]
    check_image(buffer.getvalue(), "x")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_of_grey_are_refused_by_every_reader(mode: str) -> None:
    for read in (open_image, image_size):
        with pytest.raises(RowError, match="x has 32 bits per pixel, of unknown range"):
            read(Image.new(mode, (2, 1)), "x")


def photo(kind: str, orientation: int) -> bytes:
    """A picture of 80×40 pixels, as stored, whose upper left quarter is red."""
    image, exif = Image.new("RGB", (80, 40), "blue"), Image.Exif()
    image.paste("red", (0, 0, 40, 20))
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format=kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "size", "red"), [(1, (80, 40), (0, 0)), (3, (80, 40), (1, 1)), (6, (40, 80), (1, 0))]
)
def test_images_are_upright_as_viewers_show_them(
    tmp_path: Path, kind: str, orientation: int, size: tuple[int, int], red: tuple[int, int]
) -> None:
    data = photo(kind, orientation)
    (tmp_path / "a").write_bytes(data)
    for source in (data, tmp_path / "a", Image.open(tmp_path / "a")):
        shown = open_image(source, "x")
        assert shown.size == size and image_size(source, "x") == (size[1], size[0])
        corners = {(x, y): shown.getpixel((x * (size[0] - 1), y * (size[1] - 1))) for x in (0, 1) for y in (0, 1)}
        assert [corner for corner, colour in corners.items() if colour[0] > 128] == [red]
    with Image.open(tmp_path / "a") as in_memory:
        in_memory.load()
        before = in_memory.size
        open_image(in_memory, "x")
        assert in_memory.size == before  # a user's picture stays as it is


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(1, 12_000), (12_000, 1), (10_000, 9_000)])
def test_one_limit_holds_for_every_way_to_read_an_image(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    Image.new("1", size).save(path)
    in_memory = Image.new("1", size)
    readers = [
        lambda: check_image(path.read_bytes(), str(path)),
        *(partial(read, source, str(path)) for read in (open_image, image_size) for source in (path, in_memory)),
    ]
    for read in readers:
        with pytest.raises(DataError, match=rf"a\.png has {size[0]}×{size[1]} pixels, at most"):
            read()


def test_other_limits_and_what_git_leaves_behind_are_put_in_words(tmp_path: Path) -> None:
    Image.new("1", (14_000, 14_000)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=rf"a\.png has more than the {MAX_PIXELS} pixels that are decoded"):
        image_size(tmp_path / "a.png", "a.png")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content, reason in ((pointer, "a Git LFS pointer, run `git lfs pull`"), (b"", "an empty file")):
        (tmp_path / "b.png").write_bytes(content)
        for image in (tmp_path / "b.png", content):
            with pytest.raises(DataError, match=rf"b\.png: {reason}"):
                image_size(image, "b.png")


@pytest.mark.parametrize(("kind", "options"), [("WEBP", {}), ("JPEG", {"progressive": True}), ("TIFF", {})])
def test_what_a_decoder_copies_has_a_limit_of_its_own(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, bool]
) -> None:
    image, buffer = Image.new("RGB", (40, 30)), io.BytesIO()
    image.save(buffer, format=kind, **options)
    monkeypatch.setattr(images, "MAX_DECODER_BYTES", 9000)
    for read in (open_image, image_size, check_image):
        with pytest.raises(RowError, match=rf"x has 40×30 pixels, at most \d+ are decoded of a (progressive )?{kind}"):
            read(buffer.getvalue(), "x")
    assert open_image(encoded("JPEG"), "x").size == (40, 30)


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
@pytest.mark.parametrize("orientation", [0, 6])
@pytest.mark.parametrize("size", [(304, 208), (301, 203)])
@pytest.mark.parametrize(("together", "factor"), [(1, 1), (2, 2), (5, 4), (100, 16)])
def test_large_images_are_halved(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    mode: str,
    orientation: int,
    size: tuple[int, int],
    together: int,
    factor: int,
) -> None:
    whole, exif, buffer = Image.radial_gradient("L").resize(size).convert("RGB"), Image.Exif(), io.BytesIO()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    stored = whole.convert("L").convert("I").point(lambda x: x * 257) if mode == "I;16" else whole
    stored.convert(mode).save(buffer, format=kind, exif=exif, **{"lossless": True} if kind == "WEBP" else {})
    data, at_full_size = buffer.getvalue(), open_image(buffer.getvalue(), "x")
    monkeypatch.setattr(images, "MAX_WHOLE_PIXELS", size[0] * size[1])
    monkeypatch.setattr(images, "MIN_HALVED_PIXELS", 0)
    most = most_pixels([size] * together)
    in_memory = Image.open(io.BytesIO(data))
    for source in (data, in_memory):
        shown = open_image(source, "x", most)
        assert halved(image_size(source, "x"), most) == (shown.height, shown.width)
        expected = at_full_size.reduce(factor)
        assert shown.size == expected.size
        if size[0] % 16 == 0:  # else a rotated image has its squares elsewhere
            difference = ImageChops.difference(shown, expected)
            assert max(high for _, high in difference.getextrema()) <= (20 if kind == "JPEG" else 1)
    assert sorted(in_memory.size) == sorted(size)  # a user's picture stays as it is


@pytest.mark.parametrize(
    ("whole", "shown"),
    [
        ([(336, 336)] * 256, [(336, 336)] * 256),
        ([(480, 640)] * 100, [(480, 640)] * 100),
        ([(3250, 4000), (9, 9)], [(3250, 4000), (9, 9)]),
        ([(3250, 4000), (3250, 4000)], [(1625, 2000), (1625, 2000)]),
        ([(5000, 4000), (1000, 4001), (336, 336)], [(2500, 2000), (1000, 4001), (336, 336)]),
        ([(1000, 1000)] * 25, [(500, 500)] * 25),
        ([(999, 1000)] * 25, [(999, 1000)] * 25),
        ([(8000, 8000)] + [(600, 600)] * 70, [(500, 500)] + [(600, 600)] * 70),
    ],
    ids=["towers", "many", "one-and-a-tiny-one", "pair", "largest-first", "megapixels", "smaller", "one-of-many"],
)
def test_only_the_largest_images_of_a_sample_are_halved_and_only_where_all_are_too_large(
    whole: list[tuple[int, int]], shown: list[tuple[int, int]]
) -> None:
    pictures = {(height, width): Image.new("RGB", (width, height)) for height, width in whole}
    turns = tuple(Turn("what ?", "red", 1) for _ in whole)
    sample = Sample("x", tuple(pictures[size] for size in whole), turns)
    assert [(image.height, image.width) for image in sample.open_images()] == sample.image_sizes() == shown
    assert sample.image_sizes(1) == shown[:2]
    assert [(image.height, image.width) for image in sample.open_images(0)] == shown[:1]


def test_a_picture_is_copied_only_to_change_it() -> None:
    picture = Image.new("RGB", (600, 400), "red")
    assert open_image(picture, "x") is picture
    assert len(thumbnails(Sample("x", (picture,), (Turn("what ?"),)))) == 1
    assert picture.size == (600, 400)
