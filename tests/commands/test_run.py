import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.cli import main
from tests.data.web import serving

QUESTION = "what colour is the small circle ?"


@pytest.fixture
def here(make_converted: Callable[..., Path], picture: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a calibrated checkpoint `tiny-dpn` and `picture.png`."""
    folder = make_converted()
    monkeypatch.chdir(folder.parent)
    assert picture.parent == folder.parent
    return folder.parent


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    options = ["--model", "tiny-dpn", "--image", "picture.png", "--max-new-tokens", "6", "--json"]
    assert main(["run", *options, *args, QUESTION]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found: dict[str, Any] = json.loads(captured.out)
    return found


@pytest.mark.usefixtures("here")
def test_the_answer_is_the_models_and_the_figures_are_of_its_route(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoProcessor

    import dpn_cli
    from dpn_cli.pyramid.cost import flops_fraction

    found = run_json(capsys)
    model, processor = dpn_cli.load("tiny-dpn"), AutoProcessor.from_pretrained("tiny-dpn")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=[Image.open("picture.png")], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    [route] = model.last_routes
    assert found["text"] == processor.decode(tokens, skip_special_tokens=True)
    assert tuple(found["route"]) == route and any(route)
    assert found["new_tokens"] == len(tokens)
    assert found["visual_tokens"][0] == 144 > found["visual_tokens"][-1]
    assert found["text_tokens"] + 144 == inputs["input_ids"].shape[1]
    shape = model.text_model.shape
    expected = flops_fraction(shape, model.pyramid, route, [(12, 12)], found["text_tokens"])
    assert found["flops_fraction"] == pytest.approx(expected)
    assert 0 < found["first_token_s"] <= found["total_s"]


@pytest.mark.usefixtures("here")
def test_a_route_is_forced_and_a_budget_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    forced = run_json(capsys, "--route", "keep,1x2,2x2,exit,keep")
    assert forced["experts"] == "keep,pool:1x2,pool:2x2,exit,keep"
    assert forced["visual_tokens"] == [144, 144, 72, 18, 0, 0]
    rich, poor = run_json(capsys, "--budget", "1.0"), run_json(capsys, "--budget", "0.6")
    assert rich["flops_fraction"] > poor["flops_fraction"]


@pytest.mark.usefixtures("here")
def test_a_budget_is_shown_beside_what_was_spent(capsys: pytest.CaptureFixture[str]) -> None:
    low = run_json(capsys, "--budget", "0.6")
    assert low["budget"] == {"asked": 0.6, "spent": low["flops_fraction"], "samples": 1}
    assert run_json(capsys)["budget"]["asked"] == 0.7, "λ = 2 is half way from 0.8 to 0.6"
    assert run_json(capsys, "--route", "0,0,0,0,0")["budget"] is None
    assert run_json(capsys, "--budget", "1")["budget"] is None
    line = ["run", "--model", "tiny-dpn", "--image", "picture.png", "--max-new-tokens", "2"]
    for budget in ("0.6", "0.8"):
        assert main([*line, "--budget", budget, QUESTION]) == 0
        said = capsys.readouterr().err
        spent = run_json(capsys, "--budget", budget)["flops_fraction"]
        assert ("--data DATA --budgets-only" in said) == (spent > float(budget) + 0.02)


@pytest.mark.usefixtures("here")
def test_an_image_is_the_same_wherever_it_sits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = f"data:image/png;base64,{base64.b64encode(Path('picture.png').read_bytes()).decode()}"
    with serving(Path(), {}) as (address, _):
        line = ["run", "--model", "tiny-dpn", "--allow-urls", "--json", "--max-new-tokens", "6", QUESTION, "--image"]
        answers = []
        for image in ("picture.png", Path("picture.png").absolute().as_uri(), uri, f"{address}/picture.png"):
            assert main([*line, image]) == 0
            answers.append(json.loads(capsys.readouterr().out)["text"])
    assert len(set(answers)) == 1


@pytest.mark.usefixtures("here")
def test_several_images_in_one_question(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "--route", "keep,keep,2x2,keep,keep", "--image", "picture.png")
    assert found["visual_tokens"] == [288, 288, 288, 72, 72, 72]


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_answer_streams_to_stdout_and_its_cost_to_stderr(
    here: Path, capsys: pytest.CaptureFixture[str], alone: bool
) -> None:
    """In a process of its own, too: nothing of transformers may get in between."""
    args = ["run", "--model", "tiny-dpn", "--image", "picture.png", "--max-new-tokens", "4", QUESTION]
    if alone:
        code = "import sys; from dpn_cli.cli import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code, *args], cwd=here, capture_output=True, text=True, check=True)
        output, errors = done.stdout, done.stderr
    else:
        assert main(args) == 0
        output, errors = capsys.readouterr()
    assert len(output.split()) == 4 and output.endswith("\n") and output.count("\n") == 1
    [line] = errors.splitlines()
    assert line.startswith("Route ") and ", " in line
    for part in ("visual tokens 144 →", "% of the prefill FLOPs", "first token after", "tokens/s"):
        assert part in line


def test_an_answer_tells_a_terminal_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = read_json(here / "tiny-dpn" / "tokenizer.json")
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = {f"{word}\x1b]52;c;\x07\u202e" if i > 4 else word: i for word, i in vocabulary.items()}
    write_json(here / "tiny-dpn" / "tokenizer.json", data)
    args = ["run", "--model", "tiny-dpn", "--image", "picture.png", "--max-new-tokens", "4", QUESTION]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert out.count(r"\u001b]52;c;\u0007\u202e") == 4 and "\x1b" not in out
    assert main([*args, "--json"]) == 0
    out = capsys.readouterr().out
    assert "\u202e" not in out and json.loads(out)["text"].count("\x1b]52;c;\x07\u202e") == 4


def _fill(shard: Path, byte: bytes) -> None:
    """Overwrite the values of all tensors; of the byte 0xff they are NaN."""
    content = shard.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    shard.write_bytes(content[:header] + byte * (len(content) - header))


def _broken(here: Path) -> None:
    """Copy the checkpoint, with weights that are NaN."""
    broken = shutil.copytree(here / "tiny-dpn", here / "broken")
    _fill(broken / "model-00001-of-00001.safetensors", b"\xff")


def _short(here: Path) -> None:
    """Copy the checkpoint, with few positions."""
    config = read_json(shutil.copytree(here / "tiny-dpn", here / "short") / "config.json")
    config["text_config"]["max_position_embeddings"] = 200
    write_json(here / "short" / "config.json", config)


FAULTY: dict[str, Callable[[Path], object]] = {
    "notes.txt": lambda here: (here / "notes.txt").write_text("no picture"),
    "thin.png": lambda here: Image.new("1", (1, 12_000)).save(here / "thin.png"),
    "large.png": lambda here: Image.new("1", (10_000, 9_000)).save(here / "large.png"),
    "half.png": lambda here: (here / "half.png").write_bytes((here / "picture.png").read_bytes()[:2000]),
    "broken": _broken,
    "short": _short,
}


@pytest.mark.parametrize(
    ("args", "code", "complaint"),
    [
        ("--image gone.png", 4, "gone.png"),
        ("--image notes.txt", 4, "image cannot be decoded: notes.txt: not a known image format"),
        ("--image .", 4, "a folder in place of an image: ."),
        ("--image thin.png", 4, "thin.png has 1×12000 pixels, at most 1:200 is read"),
        ("--image large.png", 4, "large.png has 10000×9000 pixels"),
        ("--image half.png", 4, "half.png"),
        ("--image data:image/png;base64,aGk", 4, "--image data:image/png;base64,aGk is not base64"),
        ("--image picture.png --image picture.png --model short", 4, "tokens with its images, but the model takes 200"),
        ("--image https://example.org/a.png", 4, "is only fetched with --allow-urls"),
        ("--image picture.png --route 0,1", 2, "expected 5 experts, one for each site of this pyramid, such as"),
        ("--image picture.png --route 0,1,0,7,0", 2, "'7' is not an expert of site 3"),
        ("--image picture.png --route 1,0,1,0,0", 2, "needs a grid of tokens, and a selection has left none"),
        ("--image picture.png --route fast", 2, "one for each site of this pyramid"),
        ("--image picture.png --route 0,0,0,0,0 --budget 0.7", 2, "give one of the two"),
        ("--image picture.png --budget 0.1", 2, "out of reach"),
        ("--image picture.png --model {source}", 3, "run `dpn convert"),
        ("--image picture.png --model broken", 3, "holds NaN or infinite values, so the model is broken"),
        ("", 2, "--image"),
    ],
)
def test_faults(
    here: Path,
    tiny_llava: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    args: str,
    code: int,
    complaint: str,
) -> None:
    for name, make in FAULTY.items():
        if name in args:
            make(here)
    assert main(["run", "--model", "tiny-dpn", *args.format(source=tiny_llava).split(), QUESTION]) == code
    captured = capsys.readouterr()
    assert complaint in captured.err and "Traceback" not in captured.err and "unexpected" not in captured.err
    assert captured.out == "" and not recwarn.list  # a warning of Python would reach the terminal raw


@pytest.mark.usefixtures("here")
def test_an_empty_question_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "tiny-dpn", "--image", "picture.png", "<image> "]) == 2
    assert "question is empty" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_question_that_is_no_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "tiny-dpn", "--image", "picture.png", "what \udcff ?"]) == 4
    assert "cannot be encoded" in capsys.readouterr().err
