"""Reading what users bring: what is taken for what, which rows are good, and what is said about the others."""

import base64
import errno
import json
import shutil
import struct
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_cli.data.demo import DemoPictures
from dpn_cli.data.faults import RowError
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.data.scan import Dataset, _draw
from dpn_cli.errors import DataError, UsageError


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "a.png"
    path.parent.mkdir()
    Image.new("RGB", (50, 40), (200, 30, 30)).save(path)
    return path


def chat(question: str = "<image>\nwhat colour is this ?", answer: str = "red") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def llava_row(**changes: Any) -> dict[str, Any]:
    return {"id": "x", "image": "images/a.png", "conversations": chat(), **changes}


def write(path: Path, rows: list[Any]) -> Path:
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text)
    return path


def load(path: Path, **options: Any) -> Dataset:
    about = {field.name: options.pop(field.name) for field in fields(DataOptions) if field.name in options}
    return load_data(DataOptions(str(path), **about), **options)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_files(tmp_path: Path, picture: Path, name: str) -> None:
    messages = [{"role": "user", "content": "which shape ?"}, {"role": "assistant", "content": " circle "}]
    rows = [llava_row(model=""), {"images": [str(picture)] * 2, "messages": messages}, llava_row(image="")]
    rows[2]["conversations"] = chat("what is red ?", "a colour")
    data = load(write(tmp_path / name, rows))
    assert data.samples == [
        Sample("x", (picture,), (Turn("what colour is this ?", "red", images=1),)),
        Sample("2", (picture, picture), (Turn("which shape ?", "circle", images=2),)),
        Sample("x", (), (Turn("what is red ?", "a colour"),)),
    ]
    assert [sample.row for sample in data.samples] == [1, 2, 3]
    assert (data.scan.rows, data.scan.with_image, data.scan.text_only, data.scan.several_images) == (3, 2, 1, 1)
    assert "`image`, `conversations` as conversation" in data.scan.lines()[0]


def test_the_fields_of_a_row_with_an_image_are_named(tmp_path: Path, picture: Path) -> None:
    text_only = {"id": 1, "system": "Be brief.", "conversations": chat("what ?")}
    data = load(write(tmp_path / "data.json", [text_only, llava_row()]))
    assert "(`image`, `conversations` as conversation)" in data.scan.lines()[0]
    assert "(no images, `conv" in load(write(tmp_path / "data.json", [text_only])).scan.lines()[0]


def test_lines_in_a_json_file_and_blank_lines(tmp_path: Path, picture: Path) -> None:
    row = json.dumps(llava_row(conversations=chat(answer="a\u2028b")), ensure_ascii=False)  # no line break in JSON
    path = tmp_path / "data.json"
    path.write_text(f"\ufeff{row}\r\n\n{row}\n")
    assert [sample.row for sample in load(path).samples] == [1, 3]


def test_rows_under_a_key_keep_their_numbers_and_faults(tmp_path: Path, picture: Path) -> None:
    row = json.dumps(llava_row())
    (tmp_path / "data.json").write_text(f'{{"about": {{"by": ["me"]}}, "rows": [{row}, {{"a": 1,}}, {row}], "n": 2}}')
    (tmp_path / "config.json").write_text('{"architectures": ["A"], "layers": [1, 2]}')
    for data in (tmp_path, tmp_path / "data.json"):
        scan = load(data, on_bad_row="skip", max_bad=0.5).scan
        assert (scan.with_image, [fault.row for fault in scan.faults]) == (2, [2])
        assert "LLaVA JSON, key 'rows'" in scan.format


@pytest.mark.parametrize("key", ["data", "qa_pairs", "images"])
def test_rows_under_a_key_are_known_by_what_they_are(tmp_path: Path, picture: Path, key: str) -> None:
    rows = [{"image": str(picture), "question": "what ?", "answer": "red"}]
    data = load(write(tmp_path / "data.json", {"description": "mine", key: rows, "text": "by me"}))
    assert data.samples[0].turns == (Turn("what ?", "red", 1),)


def test_a_list_of_thousands_of_names_is_not_written_out(tmp_path: Path) -> None:
    lists = {f"list{number}": [{"question": "what ?"}] for number in range(3000)}
    with pytest.raises(DataError, match=r"several lists \(list0, .*, list4 and 2995 more\)"):
        load(write(tmp_path / "data.json", lists))


def test_links_to_folders_are_followed_once(tmp_path: Path, picture: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(picture, tmp_path / "elsewhere" / "a.png")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "data")
    assert [sample.id for sample in load(tmp_path / "data").samples] == ["more/a.png"]


def test_a_folder_with_one_file_of_rows_is_no_folder_of_images(tmp_path: Path, picture: Path) -> None:
    write(tmp_path / "train.json", [llava_row()])
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert load(tmp_path).samples[0].turns[0].answer == "red"
    write(tmp_path / "val.jsonl", [llava_row()])
    with pytest.raises(DataError, match=r"several data files \(train\.json, val\.jsonl\)"):
        load(tmp_path)


def test_image_folder_takes_the_stock_prompts_in_turn(picture: Path) -> None:
    Image.new("RGB", (8, 8)).save(picture.with_name("b.jpg"))
    picture.with_name("._b.jpg").write_bytes(b"of macOS")
    data = load(picture.parent, prompts=("one ?", "two ?"))
    assert [(s.id, s.turns[0].question) for s in data.samples] == [("a.png", "one ?"), ("b.jpg", "two ?")]
    assert data.scan.unanswered == 2


@pytest.mark.parametrize(
    "name",
    [
        "a.txt", "a.json", "captions.json", "sub/captions.json", "sub/metadata.csv", "sub/metadata.jsonl", "a.xml",
        "b.heic", "c",
    ],
)  # fmt: skip
def test_files_beside_the_images_of_a_folder_stop_the_run(picture: Path, name: str) -> None:
    folder = picture.parent
    for about in ("README.md", "LICENSE", "Thumbs.db", ".hidden.json"):
        (folder / about).touch()
    (folder / "sub").mkdir()
    (folder / "model").mkdir()
    for of_a_model in ("config.json", "merges.txt"):
        (folder / "model" / of_a_model).touch()
    assert load(folder).scan.with_image == 1
    (folder / name).write_text('{"images": [], "annotations": [{"caption": "a red thing"}]}')
    with pytest.raises(DataError, match=rf"holds {name} beside its images: .*move the other files elsewhere"):
        load(folder)


def test_a_link_that_leads_nowhere_is_an_image_that_is_missing(picture: Path) -> None:
    picture.with_name("b.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match="row 2: missing image file"):
        load(picture.parent)


def test_images_alone_and_texts_of_unknown_names_in_a_file(tmp_path: Path, picture: Path) -> None:
    row = {"image": "images/a.png", "split": "train"}
    path = write(tmp_path / "data.json", [row] * 2)
    assert [sample.turns[0].question for sample in load(path, prompts=("one ?", "two ?")).samples] == ["one ?", "two ?"]
    write(path, [row, row | {"request": "what ?", "reply": "red"}])
    with pytest.raises(DataError, match=r"row 2: .*`request`, `reply`, of .*--ignore-fields.*names: conversation: "):
        load(path)
    assert load(path, ignored=("request", "reply")).scan.unanswered == 2
    with pytest.raises(DataError, match=r"--ignore-fields requests: .*Did you mean 'request'"):
        load(path, ignored=("requests",))
    write(path, [row, llava_row()])
    with pytest.raises(DataError, match="row 1: no text"):
        load(path)


def rows_of_other_names() -> list[dict[str, Any]]:
    row = {"picture": "images/a.png", "image": "images/none.png", "ask": "what ?", "said": "red", "caption": "a thing"}
    return [row, row | {"picture": None, "image": None, "ask": "why ?"}]


OTHER_NAMES = (("image", "picture"), ("question", "ask"), ("answer", "said"))


def test_columns_of_other_names_go_before_those_that_are_known(tmp_path: Path, picture: Path) -> None:
    path = write(tmp_path / "data.json", rows_of_other_names())
    data = load(path, columns=OTHER_NAMES, ignored=("caption",))
    assert [sample.turns for sample in data.samples] == [(Turn("what ?", "red", 1),), (Turn("why ?", "red"),)]
    assert [sample.images for sample in data.samples] == [(picture,), ()]
    assert "(`picture`, `ask` and `said`)" in data.scan.format
    messages = [{**row, "messages": chat()} for row in rows_of_other_names()]
    with pytest.raises(DataError, match=r"rows 1, 2: .*`caption`, `messages`, of the fields picture"):
        load(write(path, messages), columns=OTHER_NAMES)
    captions = load(path, columns=(*OTHER_NAMES[:1], ("caption", "said")), ignored=("ask", "caption", "messages"))
    assert captions.samples[0].turns == (Turn("Describe the image.", "red", 1),)


def test_columns_that_are_not_there_are_named(tmp_path: Path, picture: Path) -> None:
    rows = rows_of_other_names()
    path = write(tmp_path / "data.json", rows)
    with pytest.raises(DataError, match=r"--columns question=asks: .* has the fields picture, .*Did you mean 'ask'"):
        load(path, columns=(("question", "asks"),))
    del rows[1]["said"]
    with pytest.raises(
        DataError, match=r"row 2: a row that lacks a column \(no `said`, which --columns reads as answer"
    ):
        load(write(path, rows), columns=OTHER_NAMES, ignored=("caption",))
    for data in ("demo", str(picture.parent)):
        with pytest.raises(UsageError, match=r"--columns: .* is a .*pictures|images.*, which has no columns"):
            load_data(DataOptions(data, columns=OTHER_NAMES))
        with pytest.raises(UsageError, match=r"--ignore-fields: .*, which has no columns"):
            load_data(DataOptions(data, ignored=("a",)))


def test_file_names_and_formats_that_must_work(tmp_path: Path) -> None:
    folder = tmp_path / "größe und ☕"
    folder.mkdir()
    image = Image.new("RGB", (20, 30), (9, 90, 200))
    image.save(folder / "a b.jpg", format="GIF")
    image.convert("RGBA").save(folder / "c.png")
    image.convert("I;16").save(folder / "d.tiff")
    image.convert("CMYK").save(folder / "e.jpg")
    image.save(folder / "f.jpg", format="MPO")  # as phones write it
    rows = [llava_row(image=f"größe und ☕/{path.name}") for path in folder.iterdir()]
    rows.append(llava_row(image=str(folder / "c.png")))
    data = load(write(tmp_path / "data.json", rows), image_root=tmp_path)
    assert data.scan.with_image == 6
    assert {image.mode for sample in data.samples for image in sample.open_images()} == {"RGB"}


def bomb(path: Path, width: int, height: int) -> None:
    """Write a PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def bad_rows(folder: Path) -> list[tuple[Any, str]]:
    """Return rows and the reasons that they are refused for."""
    bomb(folder / "bomb.png", 60_000, 60_000)
    bomb(folder / "wide.png", 10_000, 9_000)  # above where Pillow warns, below where it refuses
    bomb(folder / "thin.png", 1, 5_000)
    (folder / "noise.jpg").write_bytes(b"GIF89a")
    (folder / "drawing.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    whole = folder / "whole.jpg"
    Image.effect_noise((200, 200), 90).save(whole)
    (folder / "half.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    Image.new("F", (9, 9), 0.5).save(folder / "float.tif")
    late = [*chat(), {"from": "system", "value": "be brief"}]
    return [
        (llava_row(image="images/bomb.png"), "image too large"),
        (llava_row(image="images/wide.png"), "image too large"),
        (llava_row(image="images/thin.png"), "image too thin"),
        (llava_row(image="images/noise.jpg"), "image cannot be decoded"),
        (llava_row(image="images/drawing.jpg"), "image cannot be decoded"),
        (llava_row(image="images/half.jpg"), "image cannot be decoded"),
        (llava_row(image="images/none.png"), "missing image file"),
        (llava_row(image="images"), "a folder in place of an image"),
        (llava_row(image="a\0b"), "missing image file"),
        (llava_row(image="a" * 5000), "missing image file"),
        (llava_row(image="\ud800.png"), "missing image file"),
        (llava_row(image=["images/a.png", 3.5]), "no image path"),
        (llava_row(image="https://example.org/a.png"), "image on the web"),
        (llava_row(image=base64.b64encode(b"GIF89a" * 9).decode()), "image cannot be decoded"),
        (llava_row(image="data:image/png;base64,////"), "image cannot be decoded"),
        (llava_row(image="images/float.tif"), "32-bit image"),
        (llava_row(conversations=chat("<image><image> what ?")), "more <image> than images"),
        (llava_row(image=None), "more <image> than images"),
        (llava_row(image=None, images=["images/a.png"] * 2), "more images than <image>"),
        (llava_row(conversations=chat(answer=" \n")), "an empty answer"),
        (llava_row(conversations=chat(answer="<image>")), "<image> outside of a question"),
        (llava_row(conversations=chat(answer="\udcff")), "broken text"),
        (llava_row(image=None, conversations=chat("", "red")), "an empty question"),
        (llava_row(conversations=[{"from": "alien", "value": "hm"}]), "unknown role"),
        (llava_row(conversations=late), "a late system message"),
        (llava_row(conversations=chat()[1:]), "an answer without a question"),
        (llava_row(conversations=[*chat(), chat()[1]]), "an answer without a question"),
        (llava_row(conversations=[{"from": "system", "value": "be brief"}]), "no question"),
        (llava_row(conversations=[{"role": "user", "content": [{"type": "video"}]}]), "unknown content"),
        (llava_row(conversations="hm"), "not a list of messages"),
        (llava_row(conversations=None), "no text"),
        ("hm", "not an object"),
    ]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_bad_row_has_its_reason(tmp_path: Path, picture: Path) -> None:
    rows, reasons = zip(*bad_rows(picture.parent), strict=True)
    path = write(tmp_path / "data.json", [llava_row(), *rows])
    scan = load(path, on_bad_row="skip", max_bad=1.0).scan
    assert [(fault.row, fault.reason) for fault in scan.faults] == list(enumerate(reasons, 2))
    assert scan.with_image == 1
    "\n".join(scan.lines()).encode()  # printable on any terminal
    with pytest.raises(DataError, match=r"32 of 33 rows read are bad: .*rows 5, 6, 7, 15, 16: image cannot be decoded"):
        load(path)


def test_rows_are_grouped_by_another_field_than_kind(tmp_path: Path, picture: Path) -> None:
    rows = [llava_row(kind="a kind", level=level) for level in ("easy", "hard")]
    path = write(tmp_path / "data.json", rows)
    assert [sample.kind for sample in load(path, kind_field="level").samples] == ["easy", "hard"]
    assert [sample.kind for sample in load(path).samples] == ["a kind"] * 2


def test_bad_rows_are_skipped_up_to_a_share(tmp_path: Path, picture: Path) -> None:
    rows = [llava_row()] * 19 + [llava_row(image="gone.png")]
    path = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=r"row 20: missing image file \(.*gone\.png\)\. Fix them, or"):
        load(path)
    assert len(load(path, on_bad_row="skip").samples) == 19
    with pytest.raises(DataError, match=r"5\.0%, more than --max-bad 0\.04"):
        load(path, on_bad_row="skip", max_bad=0.04)


def test_a_wrong_image_root_is_hinted_at(tmp_path: Path, picture: Path) -> None:
    with pytest.raises(DataError, match="Does --image-root name"):
        load(write(tmp_path / "data.json", [llava_row()] * 3), image_root=picture.parent)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("[{row}, {row},]", {3: "a comma is followed by no row"}),
        ('[{row}, {{"id": "}}",\n}}, {row}]', {2: "line 2; is there a comma too many?"}),
        ('[{row}, {{"a": "\\"]", "b": [1,]}}, {row}]', {2: "comma too many"}),
        ("[{row}, {deep}, {row}]", {2: "recursion"}),
    ],
)
def test_broken_json_is_named_by_row_and_skipped_by_choice(
    tmp_path: Path, picture: Path, text: str, bad: dict[int, str]
) -> None:
    path = tmp_path / "data.json"
    path.write_text(text.format(row=json.dumps(llava_row()), deep="[" * 100_000 + "]" * 100_000))
    scan = load(path, on_bad_row="skip", max_bad=0.5).scan
    assert {fault.row for fault in scan.faults} == set(bad)
    assert all(bad[fault.row] in fault.detail for fault in scan.faults)
    assert scan.with_image == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", "{", "expected"),
        ("data.json", "{}", "holds no JSON list"),
        ("data.json", '{"image": "a.png", "messages": [{"role": "user"}]}', "holds no JSON list"),
        ("data.json", '{"turns": [{"answer": "a"}], "question": "what ?"}', "holds one row, expected"),
        ("data.json", '{"data": [{}], "more": [{}]}', r"holds several lists \(data, more\): expected one"),
        ("data.json", '{"data": [{}], "more": }', "row 1, line 1: the object with the key 'data' does not end well"),
        ("data.json", '{"data": [{}]', "does not end well"),
        ("data.json", '{"data": [{}, {', "row 2, line 1: it has no end"),
        ("data.json", "[]", "holds no rows"),
        ("data.json", "", "holds no rows"),
        ("data.json", "[{}, {", "row 2, line 1: it has no end"),
        ("data.json", "[{}, oops]", "row 2, line 1: it has no end"),
        ("data.json", "[{}\n{}]", "row 1, line 2: no comma"),
        ("data.json", "[{}] []", "more text follows"),
        ("data.json", b"\xff\xfe[", "UTF-8"),
        ("data.jsonl", "{}\n{", "row 1: no text .*; row 2: not JSON"),
        ("data.txt", "", r"is a \.txt file: expected .*a \.json or"),
        ("empty", None, "no images"),
        ("nowhere", "missing", "does not exist"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif content != "missing":
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load(path)


@pytest.mark.parametrize("name", ["data.json", "data.csv"])
def test_a_file_that_may_not_be_read_is_not_called_a_wrong_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).write_text("[]")

    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=rf"{name} cannot be read: Permission denied$"):
        load(tmp_path / name)


def test_a_limit_draws_from_the_whole_file_and_keeps_its_order(tmp_path: Path, picture: Path) -> None:
    rows = [llava_row(id=i) if i % 3 else llava_row(id=i, image=None, conversations=chat("what ?")) for i in range(300)]
    path = write(tmp_path / "data.json", rows)
    data = load(path, limit=40, seed=1)
    numbers = [sample.row for sample in data.samples]
    assert data.scan.with_image == 40 and data.scan.text_only > 5 and data.scan.available == 300
    assert numbers == sorted(numbers) and numbers[0] < 60 and numbers[-1] > 240
    assert load(path, limit=40, seed=1).digest == data.digest
    assert load(path, limit=40, seed=2).digest != data.digest
    assert load(path, limit=250).scan.with_image == 200  # there are no more


def test_the_draw_replaces_what_a_check_refuses(tmp_path: Path, picture: Path) -> None:
    path = write(tmp_path / "data.json", [llava_row(id=i) for i in range(100)])

    def odd(sample: Sample) -> None:
        if int(sample.id) % 2:
            raise RowError("odd")

    data = load(path, limit=20, check=odd, on_bad_row="skip", max_bad=1.0)
    assert len(data.samples) == 20 and {fault.reason for fault in data.scan.faults} == {"odd"}


def test_bad_rows_of_an_earlier_round_leave_no_replacement_unread(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More are bad than are ever refused at once, but of all rows no more than may be left out."""
    monkeypatch.setattr("dpn_cli.data.scan._MANY", 10)
    monkeypatch.setattr("dpn_cli.data.scan._CHUNK", 4)
    path = write(tmp_path / "data.json", [llava_row(id=i) for i in range(100)])

    def odd(sample: Sample) -> None:
        if int(sample.id) % 4 == 0:
            raise RowError("odd")

    data = load(path, limit=74, check=odd, on_bad_row="skip", max_bad=0.5)
    assert len(data.samples) == 74 and len(data.scan.faults) > 18


def test_rows_that_stand_one_after_another_are_not_listed() -> None:
    """So that small files of many rows fit into memory."""
    assert _draw(10**12, None, seed=0)[-1] == _draw(10**12, 10**12, seed=0)[-1] == 10**12 - 1
    assert sorted(_draw(100, 10, seed=0)) == list(range(100))


def test_the_digest_follows_content_and_not_place(tmp_path: Path, picture: Path) -> None:
    path = write(tmp_path / "data.json", [llava_row()])
    before = load(path).digest
    moved = picture.rename(picture.with_name("b.png"))
    assert load(write(path, [llava_row(image=str(moved))])).digest == before
    assert load(write(path, [llava_row(image=str(moved), conversations=chat(answer="blue"))])).digest != before
    write(path, [llava_row(image=str(moved))])
    Image.new("RGB", (50, 40), (200, 30, 31)).save(moved)
    assert load(path).digest != before


def test_demo_samples_are_the_first_of_their_stream() -> None:
    few, more = (load_data(DataOptions("demo"), split="heldout", limit=limit) for limit in (3, 5))
    assert [s.id for s in few.samples] == [s.id for s in more.samples[:3]]
    assert all(s.kind and s.turns[0].answer for s in few.samples)


def test_a_demo_picture_is_composed_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = DemoPictures("heldout", 9)
    first = [demo.sample(index).id for index in (1, 0)]
    assert first == ["heldout-0-1", "heldout-0-0"]
    monkeypatch.setattr("dpn_cli.demo.pictures.compose", None)  # no more can be
    assert [demo.sample(index).id for index in (1, 0)] == first
    with pytest.raises(TypeError):
        demo.sample(8)


def test_an_image_that_changed_after_the_scan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("GIF89a")
    with pytest.raises(DataError, match=r"image cannot be decoded: .*a\.png: not a known image format"):
        Sample("x", (path,), (Turn("what ?", "red"),)).open_images()


def test_blanks_around_a_placeholder_become_one(tmp_path: Path, picture: Path) -> None:
    rows = [llava_row(conversations=chat(question)) for question in ("see <image> here", "see <image>", "a<image>b")]
    samples = load(write(tmp_path / "data.json", rows)).samples
    assert [sample.turns[0].question for sample in samples] == ["see here", "see", "ab"]


def test_rows_by_id_need_rows_as_all_values(tmp_path: Path, picture: Path) -> None:
    row = {"image": "images/a.png", "question": "what ?", "answer": "red"}
    (tmp_path / "data.json").write_text(json.dumps({"07": row, "x": {**row, "id": "own"}}))
    data = load(tmp_path / "data.json")
    assert [(sample.id, sample.row) for sample in data.samples] == [("07", 1), ("own", 2)]
    others = ({"a": row, "n": 2}, {"image": {"path": "a.png"}, "question": {"text": "what ?"}})
    for text in (*map(json.dumps, others), json.dumps({"07": row}).replace('"07":', '"07";')):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(DataError, match="holds no JSON list of rows"):
            load(tmp_path / "data.json")
