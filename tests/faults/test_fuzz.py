"""Whatever the files of a checkpoint hold: an answer or one sentence, in bounded time and memory, nothing elsewhere."""

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dpn_cli.checkpoint.headers import SINGLE_FILE
from dpn_cli.checkpoint.inspection import inspect_checkpoint
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.conversion.convert import convert
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import DpnError
from dpn_cli.exporting.export import export
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.converted import pretend_calibration
from tests.faults.damage import CONFIG, INDEX, OTHER_SHARD, SHARD
from tests.faults.limited import Hang, limited
from tests.faults.mutation import mutated
from tests.forks import in_a_fork
from tests.hr import Hr
from tests.originals import Original

SEED = 4
BIN_SHARD, BIN_INDEX = "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"
LIMIT_S = 5  # of CPU time: a case takes milliseconds
GOOD = {"an answer", "a sentence"}
CASE_BYTES = 1_000_000_000
MEMORY_BYTES = 500_000_000  # all cases of a kind together may add so much to the peak

CARD, GENERATION, TEMPLATE = "README.md", "generation_config.json", "chat_template.jinja"
PROCESSOR = ("processor_config.json", "tokenizer_config.json", "tokenizer.json", GENERATION, TEMPLATE)

# What is damaged in each kind of source.
FILES = {
    "hub": (CONFIG, INDEX, SHARD, CARD, *PROCESSOR),
    "converted": (CONFIG, INDEX, OTHER_SHARD, "dpe.safetensors"),
    "original": (CONFIG, BIN_INDEX, BIN_SHARD, "tokenizer_config.json", "added_tokens.json", "tokenizer.model"),
    "tower": (CONFIG, "preprocessor_config.json", "pytorch_model.bin"),
    "hr": (CONFIG, BIN_INDEX, BIN_SHARD),
    "tiled": (CONFIG, SINGLE_FILE, *PROCESSOR),
    "rows": ("rows.jsonl",),
    "recipe": ("recipe.yaml",),
}
CASES = {
    "hub": 5500, "converted": 3000, "original": 1000, "tower": 500, "hr": 1000, "tiled": 1500, "rows": 2000,
    "recipe": 1000,
}  # fmt: skip
QUICK = {
    "hub": 10, "converted": 20, "original": 8, "tower": 8, "hr": 20, "tiled": 5, "rows": 25, "recipe": 60,
}  # fmt: skip


def write_rows(folder: Path) -> Callable[[], Any]:
    """Write data; return what reads them."""
    rows = [{"id": i, "image": "x.png", "question": "what ?", "answer": "red"} for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    return lambda: load_data(DataOptions(str(folder / "rows.jsonl")))


def write_recipe(folder: Path) -> Callable[[], Any]:
    """Write a recipe; return what reads it."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(load_recipe("llava-1.5-7b").to_dict()))
    return lambda: load_recipe(str(folder / "recipe.yaml"))


TEXTS = {"rows": write_rows, "recipe": write_recipe}


@pytest.fixture
def subject(
    request: pytest.FixtureRequest,
    tiny_llava_factory: Callable[..., Path],
    make_original: Callable[..., Original],
    make_hr: Callable[..., Hr],
    tiny_tiled: Callable[..., Path],
    tmp_path: Path,
) -> tuple[str, Path, Callable[[], Any]]:
    """A kind, the folder to damage, and what is done with it: it may write to `out` beside the folder."""
    kind: str = request.param
    folder, out = tmp_path / "in", tmp_path / "out"

    def read_and_convert() -> None:
        inspect_checkpoint(folder)
        open_converted(convert(str(folder), output=out).output)

    def read_and_export() -> None:
        inspect_checkpoint(folder)
        export(folder, out)
        open_converted(out)

    if kind == "hub":
        shutil.copytree(tiny_llava_factory(shards=2), folder)
        (folder / CARD).write_text("---\nlicense: mit\n---\n# A model\n")
        return kind, folder, read_and_convert
    if kind in TEXTS:
        folder.mkdir()
        return kind, folder, TEXTS[kind](folder)
    if kind == "tiled":
        shutil.copytree(tiny_tiled("llava_onevision", "qwen2"), folder)
        return kind, folder, read_and_convert
    if kind == "converted":
        convert(str(tiny_llava_factory(shards=2)), output=folder)
        pretend_calibration(folder)
        return kind, folder, read_and_export
    if kind == "hr":
        folder = make_hr().original.folder
        return kind, folder, lambda: convert(str(folder), output=out)
    original = make_original(added=("<im_patch>",))
    folder = original.clip if kind == "tower" else original.folder
    return kind, folder, lambda: convert(str(original.folder), output=out, vision_tower=str(original.clip))


@pytest.mark.parametrize(
    "subject",
    [pytest.param(kind, marks=pytest.mark.slow if kind == "tiled" else []) for kind in QUICK],  # seconds
    indirect=True,
)
def test_some_damage(subject: tuple[str, Path, Callable[[], Any]], tmp_path: Path) -> None:
    in_a_fork(lambda: fuzz(*subject, tmp_path, QUICK[subject[0]]))


@pytest.mark.slow
@pytest.mark.parametrize("subject", CASES, indirect=True)
def test_much_damage(subject: tuple[str, Path, Callable[[], Any]], tmp_path: Path) -> None:
    in_a_fork(lambda: fuzz(*subject, tmp_path, CASES[subject[0]]))


def fuzz(kind: str, folder: Path, use: Callable[[], Any], around: Path, cases: int) -> None:
    """Damage one file per case; collect what went wrong, so that one run shows it all."""
    sys.addaudithook(_hook)
    contents = {name: (folder / name).read_bytes() for name in FILES[kind]}
    before = sorted(path.name for path in around.iterdir())
    use()  # what it needs to import is imported
    shutil.rmtree(around / "out", ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    for case in range(cases):
        chance = random.Random(f"{SEED} {kind} {case}")
        name = chance.choice(FILES[kind])
        (folder / name).write_bytes(mutated(name, contents[name], chance))
        outcome = result(use, around)
        shutil.rmtree(around / "out", ignore_errors=True)
        (folder / name).write_bytes(contents[name])
        if sorted(path.name for path in around.iterdir()) != before:
            outcome = f"left something: {outcome}"
        outcomes[outcome if outcome in GOOD else f"case {case}, {name}: {outcome}"] += 1
    assert set(outcomes) <= GOOD, outcomes
    assert outcomes["an answer"] and outcomes["a sentence"], outcomes
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) < MEMORY_BYTES


def result(use: Callable[[], Any], around: Path) -> str:
    """Say how a case ended: `an answer`, `a sentence`, or what is wrong."""
    try:
        with limited(LIMIT_S, CASE_BYTES), watched(around) as elsewhere:
            use()
    except DpnError as error:
        message = str(error)
        if not message or "\n" in message:
            return f"no sentence: {message}"
        outcome = "a sentence"
    except (Exception, Hang) as error:  # noqa: BLE001 - whatever it is, it is a finding
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "dpn_cli" in frame.filename]
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "elsewhere"
        return f"{type(error).__name__} at {where}: {str(error)[:100]}"
    else:
        outcome = "an answer"
    return f"wrote {elsewhere[0]}" if elsewhere else outcome


_watching: list[tuple[str, list[str]]] = []  # the hook of a fork sleeps while this is empty
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_TARGETS = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1, "shutil.rmtree": 0, "os.truncate": 0}


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or event not in _TARGETS | {"open": 0}:
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITING):
        return
    path, (allowed, found) = args[_TARGETS.get(event, 0)], _watching[-1]
    if isinstance(path, (str, bytes, os.PathLike)):
        real = os.path.realpath(os.fsdecode(path))
        if not f"{real}{os.sep}".startswith((allowed, f"{tempfile.gettempdir()}{os.sep}tmp", "/dev/null")):
            found.append(f"{event} {real}")


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Yield a list of what is written outside of a folder (and of temporary files) meanwhile."""
    found: list[str] = []
    _watching.append((os.path.realpath(folder) + os.sep, found))
    try:
        yield found
    finally:
        _watching.pop()
