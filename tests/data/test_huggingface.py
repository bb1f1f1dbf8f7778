"""Tables that the `datasets` package reads."""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

from dpn_cli.calibration.samples import load_samples
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import DataError, MissingExtraError, UsageError
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe, PredictorRecipe
from tests.runs import png


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(package.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(package.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # else 5 s for each stream
    package.disable_progress_bars()
    return package


def questions(datasets: Any) -> Any:
    rows = {"image": [Image.new("RGB", (20, 30), c) for c in ("red", "blue")], "question": ["what ?"] * 2}
    return datasets.Dataset.from_dict({**rows, "answers": [["red", "red", "rot"], ["blue"]]})


def test_parquet_with_questions_and_several_peoples_answers(datasets: Any, tmp_path: Path) -> None:
    questions(datasets).to_parquet(tmp_path / "data.parquet")
    for name in (tmp_path / "data.parquet", tmp_path):
        data = load_data(DataOptions(str(name)))
        assert [sample.turns[0].answer for sample in data.samples] == ["red", "blue"]
        assert data.scan.format == "parquet of 1 file (`image`, `question` and `answers`)"
        assert [s.open_images()[0].getpixel((0, 0)) for s in data.samples] == [(255, 0, 0), (0, 0, 255)]


def test_groups_are_columns_of_plain_values(datasets: Any, tmp_path: Path) -> None:
    table = questions(datasets).add_column("level", [1, 2])
    table.to_parquet(tmp_path / "data.parquet")
    data = load_data(DataOptions(str(tmp_path / "data.parquet"), kind_field="level"))
    assert [sample.kind for sample in data.samples] == ["1", "2"]
    with pytest.raises(UsageError, match="they have question, level"):
        load_data(DataOptions(str(tmp_path / "data.parquet"), kind_field="answers"))


def test_saved_data_sets_take_train_or_the_first_split(datasets: Any, tmp_path: Path) -> None:
    table = questions(datasets)
    table.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict({"test": table.select([0]), "train": table.select([1])})
    both.save_to_disk(tmp_path / "both")
    assert len(load_data(DataOptions(str(tmp_path / "one"))).samples) == 2
    data = load_data(DataOptions(str(tmp_path / "both")))
    assert data.samples[0].turns[0].answer == "blue" and "saved data set, split train" in data.scan.format
    assert len(load_data(DataOptions(str(tmp_path / "both" / "test"))).samples) == 1
    assert (
        load_data(DataOptions(str(next((tmp_path / "one").glob("*.arrow"))))).digest
        == load_data(DataOptions(str(tmp_path / "one"))).digest
    )


def test_parquet_files_without_rows_are_passed_over(datasets: Any, tmp_path: Path) -> None:
    table = questions(datasets)
    table.select([]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no rows"):
        load_data(DataOptions(str(tmp_path)))
    table.to_parquet(tmp_path / "b.parquet")
    assert len(load_data(DataOptions(str(tmp_path))).samples) == len(table)


def test_files_that_are_named_after_splits_are_no_one_table(datasets: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, text in (("train", "what ?"), ("test", "where ?"), ("validation", "who ?")):
        table = datasets.Dataset.from_dict({"image": [{"bytes": png()}], "question": [text]})
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    data = load_data(DataOptions(str(tmp_path)))
    assert [sample.turns[0].question for sample in data.samples] == ["what ?"]
    assert data.scan.format.startswith("parquet of 1 file, split train")
    (tmp_path / "data" / "more.parquet").write_bytes((tmp_path / "data" / "test-00000-of-00001.parquet").read_bytes())
    with pytest.raises(DataError, match=r"files of test, train, validation and others, such as more.parquet: give a"):
        load_data(DataOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("names", "read", "left"),
    [
        (("test/0000", "train/0000", "train/0001"), 2, "split train, not test"),
        (("test-00000-of-00001", "testmini-00000-of-00001"), 1, "split test, not testmini"),
        (("testA-00000-of-00001", "val-00000-of-00001"), 1, "split testA, not val"),
        (("validation/data-00000-of-00001", "training/data-00000-of-00001"), 1, "split training, not validation"),
        (("mine-test", "mine-train"), 1, "split train, not test"),
        (("some-00000-of-00002", "some-00001-of-00002"), 2, "parquet of 2 files ("),
        (("contest", "latest/1"), 2, "parquet of 2 files ("),
    ],
)
def test_splits_are_told_by_the_names_of_files_and_folders(
    datasets: Any, tmp_path: Path, names: tuple[str, ...], read: int, left: str
) -> None:
    for name in names:
        file = tmp_path / "data" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        questions(datasets).to_parquet(file)
    data = load_data(DataOptions(str(tmp_path / "data")))
    assert len(data.samples) == read * len(questions(datasets)) and left in data.scan.format


def test_what_datasets_has_computed_from_a_table_is_no_part_of_it(datasets: Any, tmp_path: Path) -> None:
    questions(datasets).save_to_disk(tmp_path / "saved")
    [file] = (tmp_path / "saved").glob("*.arrow")
    for name in ("mine-train.arrow", "cache-0123456789abcdef.arrow"):
        shutil.copy(file, tmp_path / name)
    shutil.rmtree(tmp_path / "saved")
    assert load_data(DataOptions(str(tmp_path))).scan.format.startswith("arrow of 1 file, split train")


def test_conversations_with_lists_of_images(datasets: Any, tmp_path: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what ?"}, {"type": "image", "text": None}]
    answer = [{"type": "text", "text": "red"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    images = datasets.List(datasets.Image())
    table = datasets.Dataset.from_dict({"images": [[{"bytes": png("red")}, {"bytes": png("blue")}]]})
    table = table.cast_column("images", images).add_column("messages", [messages])
    table.to_parquet(tmp_path / "data.parquet")
    [sample] = load_data(DataOptions(str(tmp_path / "data.parquet"))).samples
    assert (sample.turns[0].question, sample.turns[0].images) == ("what ?", 2)
    assert [image.getpixel((0, 0)) for image in sample.open_images()] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("image", ["a.png", {"path": "a.png", "bytes": None}, png()])
def test_images_as_paths_and_bytes(datasets: Any, tmp_path: Path, image: Any) -> None:
    (tmp_path / "a.png").write_bytes(png())
    datasets.Dataset.from_dict({"image": [image], "caption": ["a red thing"]}).to_parquet(tmp_path / "data.parquet")
    [sample] = load_data(DataOptions(str(tmp_path / "data.parquet")), prompts=("what is this ?",)).samples
    assert (sample.turns[0].question, sample.turns[0].answer) == ("what is this ?", "a red thing")
    assert sample.open_images()[0].size == (20, 30)


def test_tables_go_before_csv_files_beside_them(datasets: Any, tmp_path: Path) -> None:
    questions(datasets).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "counts.csv").write_text("split,rows\ntrain,2\n")
    assert load_data(DataOptions(str(tmp_path))).scan.rows == 2


def test_images_alone_get_stock_prompts(datasets: Any, tmp_path: Path) -> None:
    questions(datasets).select_columns(["image"]).to_parquet(tmp_path / "data.parquet")
    data = load_data(DataOptions(str(tmp_path / "data.parquet")), prompts=("one ?", "two ?"))
    assert [sample.turns[0].question for sample in data.samples] == ["one ?", "two ?"]
    assert data.scan.unanswered == 2


def test_conversations_that_datasets_stores_as_columns(datasets: Any, tmp_path: Path) -> None:
    text = datasets.Value("string")
    pairs = datasets.List({"user": text, "assistant": text})
    messages = datasets.Sequence({"from": text, "value": text})
    image = datasets.List(datasets.Image())
    cauldron = {"images": [[{"bytes": png()}]], "texts": [[{"user": "what ?", "assistant": "red"}]]}
    llava = {"images": cauldron["images"], "conversations": [{"from": ["human", "gpt"], "value": ["what ?", "red"]}]}
    forms = [(cauldron, {"images": image, "texts": pairs}), (llava, {"images": image, "conversations": messages})]
    for rows, form in forms:
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(form))
        table.to_parquet(tmp_path / "data.parquet")
        [sample] = load_data(DataOptions(str(tmp_path / "data.parquet"))).samples
        assert (sample.turns[0].question, sample.turns[0].answer, sample.turns[0].images) == ("what ?", "red", 1)


def test_text_under_unknown_names_stops_the_run_and_is_left_unread_on_request(datasets: Any, tmp_path: Path) -> None:
    table = questions(datasets).remove_columns("answers").rename_column("question", "request")
    table.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(
        DataError, match=r"rows 1, 2: .*`request`, of the fields .*--ignore-fields.*question: question, "
    ):
        load_data(DataOptions(str(tmp_path / "data.parquet")))
    data = load_data(DataOptions(str(tmp_path / "data.parquet"), ignored=("request",)), prompts=("stock ?",))
    assert [sample.turns[0].question for sample in data.samples] == ["stock ?"] * 2
    with pytest.raises(DataError, match=r"--ignore-fields requests: .* has the fields image, request\. Did you mean"):
        load_data(DataOptions(str(tmp_path / "data.parquet"), ignored=("requests",)))


def test_a_photo_in_a_table_is_upright(datasets: Any, tmp_path: Path) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (80, 40)).save(buffer, format="JPEG", exif=exif)
    rows = {"image": [{"bytes": buffer.getvalue()}], "question": ["what ?"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    [sample] = load_data(DataOptions(str(tmp_path / "data.parquet"))).samples
    assert sample.open_images()[0].size == (40, 80)
    assert sample.image_sizes() == [(80, 40)]


def test_bad_rows_of_a_table_are_named(datasets: Any, tmp_path: Path) -> None:
    rows = [png(), b"noise", png()[:60], None]
    table = {"image": [{"bytes": row} for row in rows], "question": ["what ?"] * 4, "answer": ["red", "red", "red", ""]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "data.parquet")
    scan = load_data(DataOptions(str(tmp_path / "data.parquet"), on_bad_row="skip", max_bad=0.75)).scan
    assert [(fault.row, fault.reason) for fault in scan.faults] == [
        (2, "image cannot be decoded"),
        (3, "image cannot be decoded"),
        (4, "no image path"),
    ]
    assert scan.faults[0].detail.startswith("image 1 of row 2")


def test_bad_tables_are_named(datasets: Any, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    for name, message in [("x.parquet", "has the columns x: none is known"), ("bad.parquet", "cannot be opened")]:
        with pytest.raises(DataError, match=message):
            load_data(DataOptions(str(tmp_path / name)))
    with pytest.raises(DataError, match="is not a file or folder here, and cannot be read from the hub"):
        load_data(DataOptions("no-such-owner/no-such-data"))


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    for name, message in [(str(tmp_path / "data.parquet"), "a table"), ("some/where", "no such file or folder here")]:
        with pytest.raises(MissingExtraError, match=rf"{message}.* needs .*pip install 'dpn-cli\[data\]'"):
            load_data(DataOptions(name))


def test_a_stream_reads_no_more_than_is_drawn(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [{"bytes": png()}] * 50
    table = datasets.Dataset.from_dict({"image": images, "question": [f"what {i} ?" for i in range(50)]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "data.parquet")
    stream = DataOptions(str(tmp_path / "data.parquet"), stream=True)
    first, again, other = (load_data(stream, limit=4, seed=seed) for seed in (0, 0, 1))
    assert (first.scan.with_image, first.scan.available) == (4, 8) and first.scan.format.startswith("streamed parquet")
    assert first.digest == again.digest != other.digest
    assert first.samples[0].open_images()[0].size == (20, 30)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.arrow"))
    recipe = CalibrationRecipe(samples=4, predictors=PredictorRecipe(samples=16))
    read = load_samples(stream, recipe)
    asked = [[sample.turns[0].question for sample in some] for some in (read.measured.samples, read.further)]
    assert len(asked[1]) >= 12 and not set(asked[0]) & set(asked[1]), "what is measured is not learned from elsewhere"
    with pytest.raises(UsageError, match="--stream reads no more than you ask for: say how much with --samples"):
        load_data(stream)
    (tmp_path / "data.jsonl").write_text('{"question": "what ?"}')
    with pytest.raises(UsageError, match=r"--stream: .*data\.jsonl is a LLaVA JSON lines .*, which is not read by"):
        load_data(DataOptions(str(tmp_path / "data.jsonl"), stream=True), limit=2)


def test_classes_are_read_by_their_names(datasets: Any, tmp_path: Path) -> None:
    table = questions(datasets).remove_columns("answers").add_column("label", [1, -1]).add_column("level", [0, 1])
    for name in ("label", "level"):
        table = table.cast_column(name, datasets.ClassLabel(names=["blue", "red"]))
    table.save_to_disk(tmp_path / "saved")
    data = load_data(DataOptions(str(tmp_path / "saved"), kind_field="level"))
    assert [(s.turns[0].answer, s.kind) for s in data.samples] == [("red", "blue"), (None, "red")]


@pytest.mark.parametrize(
    ("kind", "values", "answers"),
    [
        (lambda d: d.List(d.ClassLabel(names=["blue", "red"])), [[1, 1, 0], [0]], ["red", "blue"]),
        (lambda d: d.Value("float32"), [0.1, None], ["0.1", None]),
        (lambda d: d.Value("float16"), [0.1, 2.0], ["0.1", "2.0"]),
    ],
)
def test_values_are_read_as_they_were_written(
    datasets: Any, tmp_path: Path, kind: Any, values: list[Any], answers: list[str | None]
) -> None:
    table = questions(datasets).remove_columns("answers")
    features = datasets.Features({**table.features, "answer": kind(datasets)})
    rows = [{**row, "answer": value} for row, value in zip(table.to_list(), values, strict=True)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "t.parquet"))
    data = load_data(DataOptions(str(tmp_path / "t.parquet")))
    assert [sample.turns[0].answer for sample in data.samples] == answers
