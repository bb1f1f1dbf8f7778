"""Where an image may sit: every place, in a row and in a message, and what is said of other places."""

import base64
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_cli.data.faults import RowError
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.data.places import HOLDERS, Places
from dpn_cli.errors import DataError
from tests.runs import png

RED = base64.b64encode(png("red")).decode()
URI = f"data:image/png;base64,{RED}"
PERCENT = "data:image/png," + "".join(f"%{byte:02x}" for byte in png("red"))
FORMS = [
    "a.png",
    "FILE:///{folder}/a.png",
    URI,
    f"DATA:;charset=utf-8;base64,{RED[:40]}%0A{RED[40:]}",
    PERCENT,
    f"{RED[:60]}\n{RED[60:]}\n",
]
"""Texts that stand for a red picture, which is also in the file a.png of a folder."""
ENCODED = ("bytes", "base64", "data")  # keys of what is no path


def colour(path: Path, rows: list[Any]) -> list[Any]:
    path.write_text(json.dumps(rows))
    samples = load_data(DataOptions(str(path))).samples
    return [image.getpixel((0, 0)) for sample in samples for image in sample.open_images()]


def chat(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what ?"}]}]}


@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_an_image_in_every_place(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    text = form.replace("{folder}", str(tmp_path)[1:])
    rows = [
        {"image": text, "question": "what ?"},
        {"images": [{"url": text, "detail": "low"}], "question": "what ?"},
        *({"image": {key: text}, "question": "what ?"} for key in HOLDERS if key not in ENCODED),
        *(chat({"type": "image", key: text}) for key in HOLDERS if key not in ENCODED),
        chat({"type": "image_url", "image_url": text}),
        chat({"type": "image_url", "image_url": {"url": text, "detail": "high"}}),
    ]
    assert set(colour(tmp_path / "rows.json", rows)) == {(255, 0, 0)}


def test_base64_under_its_own_key_needs_no_known_beginning(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), "red").save(data := io.BytesIO(), format="PPM")
    text = base64.b64encode(data.getvalue()).decode()
    assert colour(tmp_path / "rows.json", [chat({"type": "image", "base64": text})]) == [(255, 0, 0)]


def test_images_of_several_parts_keep_their_order(tmp_path: Path) -> None:
    blue = {"type": "image", "base64": base64.b64encode(png("blue")).decode()}
    red = {"type": "image_url", "image_url": {"url": URI}}
    assert colour(tmp_path / "rows.json", [chat(red, blue), chat(blue, red)]) == [
        *((255, 0, 0), (0, 0, 255)), *((0, 0, 255), (255, 0, 0)),
    ]  # fmt: skip


def test_parts_of_other_makers_are_read(tmp_path: Path) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": RED}
    parts = [{"type": "input_text", "text": "what ?"}, {"type": "input_image", "image_url": URI}]
    asked = {"role": "user", "content": parts}
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "red"}]}
    rows = [chat({"type": "image", "source": source}), {"messages": [asked, answer]}]
    assert colour(tmp_path / "rows.json", rows) == [(255, 0, 0)] * 2


@pytest.mark.parametrize(("name", "found"), [("42", "42.jpg"), ("a.b", "a.b.png"), ("c", "c"), ("d.png", "d.png")])
def test_the_end_of_a_name_may_be_missing(tmp_path: Path, name: str, found: str) -> None:
    for file in ("42.jpg", "a.b.png", "c", "c.png", "d.png.jpg"):
        (tmp_path / file).touch()
    assert Places(tmp_path).find(name, "x", lambda: name) == tmp_path / found


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_accents_may_be_stored_in_another_way_than_the_row_has_them(tmp_path: Path, stored: str, written: str) -> None:
    for name in ("café.png", "thé.jpg"):
        (tmp_path / unicodedata.normalize(stored, name)).touch()
        asked = unicodedata.normalize(written, name)
        assert (
            Places(tmp_path)
            .find(asked, "x", lambda asked=asked: asked)
            .samefile(tmp_path / unicodedata.normalize(stored, name))
        )


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("file:///tmp/a%20b.png", "/tmp/a b.png"),
        ("file://localhost/tmp/a.png", "/tmp/a.png"),
        ("FILE:/tmp/a.png", "/tmp/a.png"),
        ("file://sub/a.png", "pictures/sub/a.png"),
        (".\\sub\\a.png", "pictures/sub/a.png"),
        ({"url": "a.png"}, "pictures/a.png"),
        ({"bytes": None, "path": "a.png"}, "pictures/a.png"),
    ],
)
def test_where_a_row_keeps_its_image(value: Any, path: str) -> None:
    assert Places(Path("pictures")).find(value, "x", lambda: value) == Path(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"pixels": "aGk="}, r"found dict with 'pixels'"),
        ({"image_url": {"href": "a.png"}}, r"found dict with 'image_url'"),
        (7.5, "found float"),
        (True, "found bool"),
        ("s3://bucket/a.png", "'s3://bucket/a.png' is not a file: expected a path or a file:// URI"),
    ],
)
def test_where_an_image_cannot_be_is_named(value: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        Places().find(value, "x", lambda: value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": {"base64": "aGk"}, "question": "what ?"},
            "row 1: image cannot be decoded .image 1 of row 1 is not base64",
        ),
        (
            chat({"type": "image", "base64": "aGk="}),
            "row 1: image cannot be decoded .image 1 of row 1: not a known image",
        ),
        ({"image": "data:text/html,hi", "question": "what ?"}, "image 1 of row 1: not a known image format"),
        (chat({"type": "image", "pixels": "aGk="}), "`pixels`, expected bytes, base64, data, path"),
        (chat({"type": "image_url", "image_url": {"url": "a.png", "caption": "a cat"}}), "`caption`, expected bytes"),
    ],
)
def test_what_is_wrong_with_an_image_in_a_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        colour(tmp_path / "rows.json", [row])
