"""WebDataset archives: what makes a sample, and what is wrong with one, by name."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.data.samples import Turn
from dpn_cli.data.webdataset import row_of
from dpn_cli.errors import DataError
from tests.runs import png


def write(path: Path, files: dict[str, Any]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def load(path: Path, **options: Any) -> Any:
    return load_data(DataOptions(str(path), **options), prompts=("stock ?",))


ASKED = {"question": "what ?", "answer": "red", "image": "train/1.png", "id": "q1"}


def test_the_files_of_a_sample_need_not_stand_together(tmp_path: Path) -> None:
    files = {
        "a/1.png": png(),
        "a/2.png": png("blue"),
        "a/1.json": ASKED,
        "a/2.json": ASKED | {"answer": "blue"},
        "a/x": b"",
    }
    data = load(write(tmp_path / "0.tar", files))
    assert [(s.id, s.turns) for s in data.samples] == [("q1", (Turn("what ?", c, 1),)) for c in ("red", "blue")]
    assert [s.open_images()[0].getpixel((0, 0)) for s in data.samples] == [(255, 0, 0), (0, 0, 255)]


def test_a_table_beside_each_archive_is_no_data_set_of_its_own(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"url": "https://x/a.jpg", "caption": "red"}]).to_parquet(tmp_path / "00000.parquet")
    write(tmp_path / "00000.tar", {"0.png": png(), "0.txt": "red"})
    assert load(tmp_path).scan.format.startswith("WebDataset")


def test_captions_and_several_images(tmp_path: Path) -> None:
    files = {
        "1.left.png": png(),
        "1.RIGHT.PNG": png("blue"),
        "1.txt": b"two things",
        "2.jpg": png(),
        "2.txt": b"one",
    }
    first, second = load(write(tmp_path / "0.tar", files)).samples
    assert (first.id, first.turns[0]) == ("1", Turn("stock ?", "two things", 2))
    assert [image.getpixel((0, 0)) for image in first.open_images()] == [(255, 0, 0), (0, 0, 255)]
    assert second.turns[0] == Turn("stock ?", "one", 1)


def test_a_map_of_the_picture_is_not_shown(tmp_path: Path) -> None:
    archive = write(tmp_path / "0.tar", {"1.jpg": png(), "1.seg.png": png("blue"), "1.txt": b"one"})
    with pytest.raises(DataError, match=r"text or images that are not read .`seg\.png`"):
        load(archive)
    [sample] = load_data(DataOptions(str(archive), ignored=("seg.png",)), ("stock ?",)).samples
    assert sample.turns[0] == Turn("stock ?", "one", 1)


def test_texts_go_by_the_names_before_their_ends(tmp_path: Path) -> None:
    files = {"1.png": png(), "1.question.txt": b"what ?", "1.answer.txt": b"red"}
    assert load(write(tmp_path / "0.tar", files)).samples[0].turns == (Turn("what ?", "red", 1),)
    files = {"1.png": png(), "1.prompt": b"what ?", "1.response": b"red"}
    assert load(write(tmp_path / "1.tar", files)).samples[0].turns == (Turn("what ?", "red", 1),)
    same = {"1.png": png(), "1.json": {"caption": "one", "width": 9}, "1.txt": b"one"}  # as img2dataset writes them
    assert load(write(tmp_path / "2.tar", same)).samples[0].turns == (Turn("stock ?", "one", 1),)
    with pytest.raises(DataError, match="1 has several files for its caption"):
        load(write(tmp_path / "3.tar", {"1.png": png(), "1.txt": b"one", "1.caption": b"two"}))


def test_the_archives_of_a_folder_have_names_of_their_own(tmp_path: Path) -> None:
    for name, colour in (("b", "blue"), ("a", "red")):
        write(tmp_path / f"{name}.tar", {"1.png": png(colour), "1.txt": colour.encode()})
    data = load(tmp_path)
    assert [s.turns[0].answer for s in data.samples] == ["red", "blue"]
    assert data.scan.format.startswith("WebDataset of 2 archives")
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:600])
    with pytest.raises(DataError, match=r"b\.tar is damaged, or not an uncompressed tar"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"2.png": png()}, "row 2: a sample that lacks a file .2 has 2.png, but no json"),
        ({"2.json": ASKED}, "row 2: a sample that lacks a file .2 has 2.json, but no image"),
        ({"2.png": png(), "2.json": b"{"}, "row 2: not JSON"),
        ({"2.png": png(), "2.json": [1]}, "row 2: not an object .expected an object in the JSON of a sample"),
        ({"2.png": png(), "2.json": b"\xff"}, r"row 2: broken text .2\.json in 0\.tar is not UTF-8"),
        ({"2.png": b"noise", "2.json": ASKED}, r"row 2: image cannot be decoded .2\.png in 0\.tar: not a known"),
        (
            {"2.0.png": png(), "2.0.json": ASKED, "2.1.png": png(), "2.1.json": {**ASKED, "question": "how ?"}},
            "row 2: two texts of a kind .2 has several files for its question: names of samples end at their first dot",
        ),
        ({"2.png": png(), "2.json": ASKED, "2.mp3": b"sound"}, "row 2: text or images that are not read .`mp3`, of"),
    ],
)
def test_faults_are_named_by_row_and_file(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "0.tar", {"1.png": png(), "1.json": ASKED, **files})
    with pytest.raises(DataError, match=message):
        load(path)
    assert load(path, on_bad_row="skip", max_bad=0.5).scan.with_image == 1


def test_archives_that_are_none_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match="not an uncompressed tar"):
        load(tmp_path / "0.tar")
    with pytest.raises(DataError, match="holds no samples"):
        load(write(tmp_path / "0.tar", {"x": b""}))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("1.json"))
    with pytest.raises(DataError, match=r"holds two files of the name 1\.json"):
        load(tmp_path / "0.tar")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"holds 1\.png, which is a link"):
        load(tmp_path / "0.tar")


@pytest.mark.parametrize("damage", ["a flipped bit in a header", "a cut in a header", "a cut in a file"])
def test_a_damaged_archive_is_not_read_as_a_shorter_one(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "0.tar", {"1.png": png(), "1.json": ASKED, "2.png": png("blue"), "2.json": ASKED})
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    content = bytearray(path.read_bytes())
    content[third.offset] ^= 1
    cuts = {"a cut in a header": third.offset + 100, "a cut in a file": third.offset_data + 10}
    path.write_bytes(path.read_bytes()[: cuts[damage]] if damage in cuts else content)
    with pytest.raises(DataError, match=r"0\.tar is damaged"):
        load(path)


def test_an_archive_needs_no_mark_of_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", {"1.png": png(), "1.json": ASKED})
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    path.write_bytes(path.read_bytes()[:end])
    assert len(load(path).samples) == 1


def test_columns_of_datasets_make_the_same_rows() -> None:
    image = {"bytes": png(), "path": "1.png"}
    row = row_of({"png": image, "json": {"question": "what ?"}, "__key__": "1", "__url__": "0.tar"})
    assert row == {"id": "1", "question": "what ?", "decoded_image": [image]}


def test_a_webdataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    archive = write(tmp_path / "0.tar", {"1.png": png(), "1.json": ASKED, "2.png": png("blue"), "2.json": ASKED})
    real = datasets.load_dataset

    def of_the_hub(name: str, config: None, split: None, streaming: bool) -> Any:
        assert name == "owner/name"
        return real("webdataset", data_files=str(archive), cache_dir=str(tmp_path / "cache"), streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", of_the_hub)
    monkeypatch.chdir(tmp_path)
    for stream in (False, True):
        data = load_data(DataOptions("owner/name", stream=stream), limit=2)
        assert {s.open_images()[0].getpixel((0, 0)) for s in data.samples} == {(255, 0, 0), (0, 0, 255)}
        assert {s.turns[0].question for s in data.samples} == {"what ?"}
        assert data.columns == {
            "decoded_image": "image",
            "question": "question",
            "answer": "answer",
            "id": "id",
            "image": "",
        }
