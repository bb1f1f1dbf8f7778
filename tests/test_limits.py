"""Small inputs that ask for minutes or gigabytes are refused; each case has a few seconds and megabytes to show it."""

import json
import multiprocessing
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dpn_cli.inference.trial  # noqa: F401 - imports take memory, and none is to be taken by a case
from dpn_cli import limits
from dpn_cli.checkpoint import encoding
from dpn_cli.checkpoint.encoding import validate_encoding
from dpn_cli.checkpoint.headers import read_header, read_json
from dpn_cli.checkpoint.licence import read_licence
from dpn_cli.checkpoint.template import ChatTemplate
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.cli import main
from dpn_cli.conversion.convert import convert
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import CheckpointError, DataError, RecipeError, UsageError
from dpn_cli.pyramid.recipe_files import available_recipes, load_recipe
from dpn_cli.pyramid.strict_yaml import parse_yaml
from tests.conftest import CHAT_TEMPLATE
from tests.faults.limited import limited
from tests.faults.mutation import ALIAS_BOMB, LOOPS, MERGE_BOMB
from tests.originals import Original

ROW = '{"image": "x.png", "question": "what ?"}'


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    with limited(seconds=10, nbytes=500_000_000):
        yield


def test_the_docs_state_every_limit() -> None:
    stated = (Path(limits.__file__).parents[1] / "docs" / "limits.md").read_text(encoding="utf-8")
    values = {name: value for name, value in vars(limits).items() if name.isupper()}
    assert [name for name, value in values.items() if f"{value:,}" not in stated] == []


@pytest.mark.parametrize(
    "text",
    [
        ROW + "\n" * 200_000 + ROW,
        ROW + " \r\n" * 200_000 + ROW,
        '[{"x": "' + '\\"' * 200_000,
        '[{"x": "' + "\\" * 200_001,
        "[" + '{"x": ["a", ' * 50_000,
        pytest.param("[" + ",\n".join(['{"x": }'] * 20_000) + "]", marks=pytest.mark.slow),
        "\n".join([ROW, *['{"x": }'] * 20_000]),
        "[" + "[{" * 200_000,
        ROW + "\n" * 30_000_000 + ROW,
        "[" + ROW + "\n" * 30_000_000 + "}]",
        "1\n" * 200_000,
        pytest.param("[" + "1," * 200_000 + "1]", marks=pytest.mark.slow),
    ],
    ids=[
        "blank",
        "crlf",
        "escapes",
        "backslashes",
        "unclosed",
        "broken-list",
        "broken-lines",
        "deep",
        "very-blank",
        "late",
        "numbers",
        "list",
    ],
)
def test_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError):
        load_data(DataOptions(str(tmp_path / "rows.jsonl")))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"question": "a " * 600_000}, "1,199,999 characters of text"),
        ({"question": "what ?", "answer": "b" * 1_000_001}, "1,000,007 characters of text"),
        ({"conversations": [{"from": ("human", "gpt")[i % 2], "value": "a"} for i in range(2000)]}, "1,000 turns"),
        ({"image": ["x.png"] * 257, "question": "what ?"}, "257 images"),
    ],
)
def test_lengths_of_a_row(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "x.png"} | row))
    with pytest.raises(DataError, match=f"too long \\({what}, at most"):
        load_data(DataOptions(str(tmp_path / "rows.jsonl")))


def test_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(",".join(f"c{i}" for i in range(60_000)) + "\n" + "," * 59_999 + "\n")
    with pytest.raises(DataError, match="has the columns c0, c1"):
        load_data(DataOptions(str(tmp_path / "rows.csv")))


@pytest.mark.parametrize("shape", [[1] * 200_000, [2**40] * 200_000])
def test_dimensions_of_a_tensor(tmp_path: Path, shape: list[int]) -> None:
    raw = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    with pytest.raises(CheckpointError, match="impossible shape"):
        read_header(tmp_path / "x.safetensors")


def test_header_of_a_shard(tmp_path: Path) -> None:
    entries = {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}
    raw = json.dumps(entries).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(CheckpointError, match=r"x\.safetensors has a header of [\d,]+ bytes, expected at most"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", [ALIAS_BOMB, "a: &a [*a, *a]", "[" * 30_000, "x: [" + "1, " * 200_000 + "]"])
def test_yaml(text: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        parse_yaml(text, "recipe.yaml")


def test_depth_of_an_override() -> None:
    with pytest.raises(RecipeError, match="nests 30001 keys; at most 100"):
        load_recipe(available_recipes()[0], ["a." * 30_000 + "b=1"])


def test_aliases_of_a_few_values_are_written_out() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]", "x") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@pytest.mark.parametrize(
    "head", [MERGE_BOMB, ALIAS_BOMB, "[" * 30_000, "x: 1\n" * 200_000, "date: 2024-99-99", "x: !!int y", "? [a]\n: b"]
)
def test_the_head_of_a_model_card_never_stops_anything(tmp_path: Path, head: str) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{head}\n---\n")
    assert read_licence(tmp_path, {"license": "other"})["license"] in ("mit", "other")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("where", ["", pytest.param("{% if messages|length > 1 %}", marks=pytest.mark.slow)])
def test_templates(tmp_path: Path, loop: str, where: str) -> None:
    text = f"{where}{loop}{where and '{% endif %}'}{CHAT_TEMPLATE}"
    with pytest.raises(CheckpointError, match="takes more than 1 s or 300 MB"):
        ChatTemplate(text, tmp_path / "chat_template.jinja").validate("<image>", {})


A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    ("part", "value", "fault"),
    [
        ("pre_tokenizer", split(r"^(\w+\s?)*\d$"), "fails with 'Onig: .*retry-limit"),
        ("pre_tokenizer", split("\\"), "fails with 'Onig"),
        ("normalizer", replace({"Regex": "(a+)+$"}, ""), "fails with 'Onig: .*retry-limit"),
        ("normalizer", {"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 1000)] * 4}, "takes more"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA" * 1000}, "fails with 'index out of"),
        (
            "post_processor",
            {"type": "TemplateProcessing", "single": [A] * 30_000, "pair": [A, B], "special_tokens": {}},
            "makes 120,000 tokens of 13 characters",
        ),
        pytest.param(
            "decoder",
            {"type": "Sequence", "decoders": [replace({"String": "a"}, "a" * 1000)] * 4},
            "takes more",
            marks=pytest.mark.slow,
        ),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}, "fails with 'Token"),
    ],
)
def test_tokenizers(tiny_llava: Path, tmp_path: Path, part: str, value: object, fault: str) -> None:
    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    write_json(source / "tokenizer.json", read_json(source / "tokenizer.json") | {part: value})
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json has a {part} that {fault}"):
        validate_encoding(source)


@pytest.mark.parametrize(("nbytes", "seconds"), [(0, 1), (32 << 20, 9)])
def test_a_large_tokenizer_has_more_time(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, seconds: int
) -> None:
    granted: list[int] = []
    monkeypatch.setattr(encoding, "run_bounded", lambda work, seconds, nbytes: granted.append(seconds) or "")
    text = (tiny_llava / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text + " " * nbytes, encoding="utf-8")
    validate_encoding(tmp_path)
    assert granted == [seconds]


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("config.json", ("num_labels",), 2_000_000),
        ("config.json", ("text_config", "num_labels"), 2_000_000),
        pytest.param("config.json", ("vision_config", "num_channels"), 10**9, marks=pytest.mark.slow),
        ("config.json", ("text_config", "max_position_embeddings"), 100),
        ("config.json", ("text_config", "layer_types"), ["full_attention"] * 20_000),
        ("generation_config.json", ("bad_words_ids",), [[1]] * 100_000),
        ("tokenizer_config.json", ("additional_special_tokens",), [f"<{i}>" for i in range(20_000)]),
        ("tokenizer_config.json", ("chat_template",), "x" * 5_000_000),
        ("tokenizer_config.json", ("pad_token",), "x" * 1_000_000),
        ("tokenizer_config.json", ("added_tokens_decoder",), {"300": {"content": "x" * 1_000_000}}),
        ("tokenizer.json", ("padding",), {"strategy": {"Fixed": 10**8}}),
        ("processor_config.json", ("num_additional_image_tokens",), 10**9),
        ("processor_config.json", ("image_processor", "size"), {"shortest_edge": 10**7}),
    ],
)
def test_numbers(
    tiny_llava: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    keys: tuple[str, ...],
    value: object,
) -> None:
    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    data = inner = read_json(source / file)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write_json(source / file, data)
    assert main(["convert", str(source), "-o", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert keys[-1] in said or f"{file} has" in said
    assert not (tmp_path / "out").exists()


def test_a_long_token_of_an_original(make_original: Callable[..., Original], tmp_path: Path) -> None:
    original = make_original(added=("x" * 1_000_000,))
    with pytest.raises(CheckpointError, match="has a token of 1,000,000 characters, expected at most 10,000"):
        convert(str(original.folder), output=tmp_path / "out", vision_tower=str(original.clip))


def test_values_that_are_not_in_the_file(tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import load_file

    source = Path(shutil.copytree(tiny_llava, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    torch.save(tensors | {name: torch.zeros(1).expand(304, 64)}, source / "pytorch_model.bin")
    assert main(["convert", str(source), "-o", str(tmp_path / "out")]) == 3
    assert "fewer values than its shape has" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "x.png", "state.json"])
def test_pipes_as_data(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for data in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=r"neither a file nor a folder|a pipe or a device"):
            load_data(DataOptions(str(data)))


def test_a_pipe_as_template(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "template")
    with pytest.raises(UsageError, match="a pipe or a device"):
        ChatTemplate.read(tmp_path / "template")


def test_a_pipe_as_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".dpn").mkdir()
    os.mkfifo(".dpn/current.json")
    assert main(["inspect"]) == 2
    assert "current.json is neither a file nor a folder" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (20_000, 20_000)])
def test_pictures(
    make_converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], size: tuple[int, int]
) -> None:
    Image.new("1", size).save(tmp_path / "x.png")
    assert main(["run", "--model", str(make_converted()), "--image", str(tmp_path / "x.png"), "what ?"]) == 4
    assert "image too" in capsys.readouterr().err


@pytest.mark.parametrize("pictures", [["large"], pytest.param(["several"] * 8, marks=pytest.mark.slow)])
def test_large_pictures_take_little_memory(
    make_converted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: list[str]
) -> None:
    side = 9000 if pictures == ["large"] else 4800
    Image.new("RGB", (side, side)).save(tmp_path / "x.png", compress_level=1)
    shown = [part for _ in pictures for part in ("--image", str(tmp_path / "x.png"))]
    assert main(["run", "--model", str(make_converted()), *shown, "what ?", "--max-new-tokens", "1"]) == 0


def test_templates_are_tried_under_limits_of_the_users_own(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))  # as `ulimit -t`, which cannot be raised again
        ChatTemplate(CHAT_TEMPLATE + " ", tmp_path).validate("<image>", {})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_templates_are_tried_in_the_worker_of_a_data_loader(tmp_path: Path) -> None:
    template = ChatTemplate(CHAT_TEMPLATE + "  ", tmp_path)
    worker = multiprocessing.get_context("fork").Process(
        target=template.validate, args=("<image>", dict[str, str]()), daemon=True
    )
    worker.start()
    worker.join()
    assert worker.exitcode == 0
