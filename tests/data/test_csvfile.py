"""CSV and TSV files: cells as they are, and faults by row and column."""

import base64
import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.data.samples import Turn
from dpn_cli.errors import DataError

CAPTION = Turn("stock ?", "a red thing .", 1)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((400, 400), 90).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "text", "turn"),
    [
        (
            "metadata.csv",
            'file_name,text\r\na.png,"a ""red"", red\nthing"\r\n',
            Turn("stock ?", 'a "red", red\nthing', 1),
        ),
        ("questions.csv", "\ufeffimage,question,answer\n\na.png,which ?,007\n", Turn("which ?", "007", 1)),
        ("labels.TSV", "image\tquestion\tanswer\na.png\twhat, now ?\tNone\n", Turn("what, now ?", "None", 1)),
        ("q.csv", "image,question,answer\na.png,which\u2028 ?,\n", Turn("which\u2028 ?", None, 1)),
        ("results.csv", "image_name| comment_number| comment\na.png| 0| a red thing .\n", CAPTION),  # Flickr30k
    ],
)
def test_csv_files_alone_and_beside_their_images(tmp_path: Path, name: str, text: str, turn: Turn) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / name).write_bytes(text.encode())
    for data in (folder, folder / name):
        [sample] = load_data(DataOptions(str(data)), prompts=("stock ?",)).samples
        assert (sample.turns, sample.images) == ((turn,), (folder / "a.png",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,tag\na.png,red\n", "has the columns id, tag: none is known"),
        ("file_name,label\na.png,red\n", "`label`, of the fields file_name, label.*--ignore-fields"),
        ("file_name,text\na.png,a\na.png,red,blue\n", "row 2: a row with too many cells .3 cells for the 2 columns"),
        ("file_name,text\na.png\n", "row 1: a row that lacks a column .1 cells, so nothing for `text`"),
        ("file_name,text,text\na.png,red,blue\n", "'text' appears twice in the header file_name, text, text"),
        ('file_name,text\na.png,"a\nb"\na.png,"red\na.png,b\n', "line 4: row 2, column `text`: a quote is left open"),
        ('file_name,text\na.png,"red" apple\n', "line 2: row 1, column `text`: a quote is left open, or closed before"),
        ('file_name,"text\na.png,red\n', "line 1: the header, column `2`: a quote"),
        ("file_name,text\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_bad_csv_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(DataError, match=rf"data\.csv.*(?:{message})"):
        load_data(DataOptions(str(tmp_path)))
    (tmp_path / "more.csv").touch()
    with pytest.raises(DataError, match=r"several data files \(data\.csv, more\.csv\)"):
        load_data(DataOptions(str(tmp_path)))


def test_a_cell_names_the_row_that_holds_its_image(tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    rows = [(0, "1", "what ?"), (1, base64.b64encode(png()).decode(), "what ?")]
    table.write_text("\n".join(["index\timage\tquestion", *("\t".join(map(str, row)) for row in rows)]))
    first, second = (sample.open_images()[0] for sample in load_data(DataOptions(str(table))).samples)
    assert first.tobytes() == second.tobytes()
    table.write_text(table.read_text().replace("0\t1", "0\t2"))
    with pytest.raises(DataError, match="row 1: missing image file"):
        load_data(DataOptions(str(table)))


def test_images_in_base64_cells_of_any_length(tmp_path: Path) -> None:
    cell = base64.b64encode(png()).decode()
    assert len(cell) > 1 << 17  # the limit that Python's csv has by default
    (tmp_path / "mmbench.tsv").write_text(f"index\timage\tquestion\tA\tB\tanswer\n7\t{cell}\twhich ?\tred\tblue\tB\n")
    [sample] = load_data(DataOptions(str(tmp_path / "mmbench.tsv"))).samples
    assert sample.open_images()[0].size == (400, 400) and sample.turns[0].answer == "B"


def write_row(folder: Path, *lines: list[str]) -> None:
    """Write `rows.csv`, and the picture that its row names."""
    (folder / "a.png").write_bytes(png())
    with (folder / "rows.csv").open("w") as file:
        csv.writer(file).writerows(lines)


def test_a_cell_that_pandas_has_written_for_nothing_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "rows.csv").write_text("image,question,answer\na.png,what ?,nan\n")
    [sample] = load_data(DataOptions(str(tmp_path / "rows.csv"))).samples
    assert sample.turns == (Turn("what ?", None, 1),)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_may_have_another_delimiter(tmp_path: Path, picture: Path, delimiter: str) -> None:
    cells = [["\ufefffile_name", "question", "answer"], [str(picture), '"one, two\nor ""three""?"', "two"]]
    (tmp_path / "data.csv").write_text("\r\n".join(map(delimiter.join, cells)))
    [sample] = load_data(DataOptions(str(tmp_path / "data.csv"))).samples
    assert sample.turns == (Turn('one, two\nor "three"?', "two", 1),)


@pytest.mark.parametrize(
    ("column", "cell", "answer"),
    [
        ("answers", "['blue' 'red' 'red']", "red"),
        ("answers", "['it is blue' \"it's red\"\n \"it's red\"]", "it's red"),
        ("answers", "[{'answer': 'blue', 'answer_id': 1}\n {'answer': 'red'}\n {'answer': 'red'}]", "red"),
        ("answers", '[{"answer": "net", "is_sure": true}, {"answer": "net", "is_sure": null}]', "net"),
        ("answer", "[{'label': 'cat', 'box': [1, 2, 3, 4]}]", "[{'label': 'cat', 'box': [1, 2, 3, 4]}]"),
    ],
)  # fmt: skip
def test_a_cell_holds_a_list_as_pandas_or_numpy_prints_it(tmp_path: Path, column: str, cell: str, answer: str) -> None:
    write_row(tmp_path, ["image", "question", column], ["a.png", "what ?", cell])
    [sample] = load_data(DataOptions(str(tmp_path / "rows.csv"))).samples
    assert sample.turns == (Turn("what ?", answer, 1),)


@pytest.mark.parametrize("choices", ["['ball' 'cube']", "['ball', 'cube']", '["ball", "cube"]'])
def test_a_cell_holds_choices_as_pandas_or_numpy_prints_them(tmp_path: Path, choices: str) -> None:
    write_row(tmp_path, ["image", "question", "choices", "answer"], ["a.png", "what ?", choices, "cube"])
    [turn] = load_data(DataOptions(str(tmp_path / "rows.csv"))).samples[0].turns
    assert "A. ball\nB. cube\n" in turn.question and turn.answer == "B"


def test_a_cell_holds_a_conversation_as_pandas_prints_it(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "which ?"}, {"from": "gpt", "value": '["red", "blue"]'}]
    write_row(tmp_path, ["image", "conversations"], ["a.png", str(said)])
    [sample] = load_data(DataOptions(str(tmp_path / "rows.csv"))).samples
    assert sample.turns == (Turn("which ?", '["red", "blue"]', 1),), "what a message says is no list of answers"
