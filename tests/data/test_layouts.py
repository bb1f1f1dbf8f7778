"""The examples of docs/data-layouts.md, written to disk and read: question, answer, image and order of three rows."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from PIL import Image

from dpn_cli.commands.data_options import data_options
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from tests.data.web import serving

DOCUMENT = Path(__file__).parents[2] / "docs" / "data-layouts.md"
ROWS = re.compile(r"^\| \[(.+?)\]\(#(.+?)\)", re.MULTILINE)  # of the table of layouts
COMMAND = re.compile(r"^    (--data .+)$", re.MULTILINE)
FILE = re.compile(r"^`(\S+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
QUESTIONS = [f"What colour is the {place} picture?" for place in ("first", "second", "third")]
STOCK = "Describe the picture."
UNASKED = {"Captions", "COCO", "Images alone"}
UNANSWERED = {"Batch requests", "Images alone"}
DRAWN = {"Stream"}
IN_ORDER = 1  # a seed that shuffles three rows into their order


def sections() -> dict[str, str]:
    _, *parts = re.split(r"^## (.+)$", DOCUMENT.read_text(), flags=re.MULTILINE)
    return {title: text for title, text in zip(parts[::2], parts[1::2], strict=True) if COMMAND.search(text)}


SECTIONS = sections()


def parse(line: str) -> DataOptions:
    command = click.command()(data_options(lambda data: data))
    options = command.main(shlex.split(line), standalone_mode=False)
    assert isinstance(options, DataOptions)
    return options


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for number, colour in enumerate(COLOURS.values(), 1):
        Image.new("RGB", (8, 8), colour).save(f"pictures/{number}.png")
    return tmp_path


@pytest.fixture
def web(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the folder in place of example.org."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_folder / "cache"))
    with serving(in_folder, {}) as (address, _):
        yield address


@pytest.mark.parametrize("layout", SECTIONS)
def test_the_example_of_a_layout_is_read(
    layout: str, in_folder: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SECTIONS[layout]
    if "datasets" in text:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", in_folder / "cache")
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # else 5 s
        datasets.disable_progress_bars()
    for name, content in FILE.findall(text):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content.replace("https://example.org", web))
    for code in CODE.findall(text):
        exec(code, {})
    [line] = COMMAND.findall(text)
    limit, seed = (3, IN_ORDER) if layout in DRAWN else (None, 0)
    samples = load_data(parse(line), prompts=(STOCK,), limit=limit, seed=seed).samples
    turns = [turn for sample in samples for turn in sample.turns]
    assert [turn.question for turn in turns] == ([STOCK] * 3 if layout in UNASKED else QUESTIONS)
    assert [turn.answer for turn in turns] == ([None] * 3 if layout in UNANSWERED else list(COLOURS))
    shown = [[image.getpixel((0, 0)) for image in sample.open_images()] for sample in samples]
    assert shown == [[colour] for colour in COLOURS.values()]


def test_the_table_names_every_layout() -> None:
    titles = [title for title, link in ROWS.findall(DOCUMENT.read_text()) if link == title.lower().replace(" ", "-")]
    assert titles == list(SECTIONS)
