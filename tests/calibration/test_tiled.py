"""Images that are cut into tiles: encoded as the processor does, measured as plain forwards say, calibrated, run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpn_cli.calibration.rollout import RouteTree, measure, plan_batches
from dpn_cli.checkpoint.inspection import inspect_checkpoint
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.cli import main
from dpn_cli.conversion.convert import convert
from dpn_cli.data.encoding import IGNORED, collate, encode, expected_grids, prompts, token_limit
from dpn_cli.data.faults import RowError
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.evaluation.judging import Evaluator
from dpn_cli.evaluation.latency import prompts_of, synthetic_inputs
from dpn_cli.inference.loading import load_model, load_processor
from dpn_cli.pyramid.experts import num_tokens
from dpn_cli.pyramid.recipe_files import load_recipe
from dpn_cli.pyramid.route import format_route
from tests.pyramids import POOLING

FAMILIES = {"llava_next": "mistral", "llava_onevision": "qwen2"}
WIDE, TALL, SQUARE = (
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))
    for seed, size in enumerate([(30, 70), (90, 31), (40, 40)])
)
SMALL = "pyramid.min_visual_tokens=4"


@pytest.fixture(params=FAMILIES)
def converted(request: pytest.FixtureRequest, tiny_tiled: Callable[..., Path], tmp_path: Path) -> Path:
    source = tiny_tiled(request.param, FAMILIES[request.param])
    return convert(str(source), load_recipe("llava-next", [SMALL, *POOLING]), tmp_path / "tiled-dpn").output


def test_samples_are_encoded_as_the_processor_does(converted: Path) -> None:
    processor, layout = load_processor(converted), open_converted(converted)[1]
    turns = (Turn("what ?", "red", 1), Turn("which ?", "blue", 1))
    for sample in (Sample("one", (WIDE,), turns[:1]), Sample("two", (TALL, WIDE), turns)):
        example = encode(sample, processor, answer_tokens=8)
        text = "".join(f"USER: <image>\n{turn.question} ASSISTANT: {turn.answer} </s> " for turn in sample.turns)
        expected = processor(text=text, images=[list(sample.images)], return_tensors="pt")
        assert example.input_ids.tolist() == expected["input_ids"][0].tolist()
        assert set(example.visual) == expected.keys() - {"input_ids", "attention_mask"}
        assert all(torch.equal(example.visual[name], expected[name]) for name in example.visual)
        token_limit(processor, layout, len(example.input_ids), 8)(sample)
        with pytest.raises(RowError, match=f"{len(example.input_ids)} tokens with its images"):
            token_limit(processor, layout, len(example.input_ids) - 1, 8)(sample)


def test_prompts_of_different_tiles_are_answered_as_one_by_one(converted: Path) -> None:
    model, processor = load_model(converted), load_processor(converted)
    images = [(WIDE,), (), (TALL, SQUARE), (SQUARE,)]
    samples = [Sample(str(i), each, (Turn("what is this ?"),)) for i, each in enumerate(images)]
    model.set_route((1, 0, 1))
    batch = prompts(samples, processor)
    together = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for sample, tokens in zip(samples, together, strict=True):
        inputs = prompts([sample], processor)
        alone = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert alone.tolist() == tokens[: len(alone)].tolist()


def test_costs_are_those_of_the_tiles(converted: Path) -> None:
    """What eval and bench price a prompt by is what the model has seen."""
    model, processor = load_model(converted), load_processor(converted)
    images = [(WIDE,), (), (TALL, SQUARE), (SQUARE,)]
    samples = [Sample(str(i), each, (Turn("what is this ?"),)) for i, each in enumerate(images)]
    batch = prompts(samples, processor)
    model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert Evaluator(model, processor, 2, 4).sizes(samples) == prompts_of(model, batch)
    assert [prompt.grids for prompt in prompts_of(model, batch)] == model.last_grids
    picture = processor(text=processor.image_token, images=[[WIDE]], return_tensors="pt")
    synthetic = synthetic_inputs(model, picture, [3, 7])
    model.generate(**synthetic, max_new_tokens=1, do_sample=False)
    assert model.last_grids == [model.last_grids[0]] * 2 != [()] * 2
    assert [prompt.text_tokens for prompt in prompts_of(model, synthetic)] == [3, 7]


def test_measured_routes_equal_forced_forwards(converted: Path) -> None:
    model, processor = load_model(converted), load_processor(converted)
    images = [(WIDE,), (TALL,), (SQUARE, WIDE), (SQUARE,)]
    samples = [Sample(str(i), each, (Turn("what is this ?", "red circle"),)) for i, each in enumerate(images)]
    examples = [encode(sample, processor, answer_tokens=8) for sample in samples]
    layout = open_converted(converted)[1]
    grids = [expected_grids(sample, layout) for sample in samples]
    assert len(set(grids)) == 4
    tree = RouteTree.of(model.pyramid, grids)
    batches = plan_batches(tree, model.pyramid, grids, 4, None)
    assert len(batches) == 1, "samples that are offered the same routes share a batch"
    table = measure(model, examples, tree, batches, pad_token_id=3)
    for row, example in enumerate(examples):
        inputs = collate([example], pad_token_id=3)
        answers = (example.labels[1:] != IGNORED).nonzero()[:, 0]
        with model.teacher(), torch.no_grad():
            teacher = model(**inputs).logits[0, answers].log_softmax(-1)
        for column, route in list(enumerate(table.tree.routes))[1::9]:
            model.set_route(route)
            with torch.no_grad():
                student = model(**inputs).logits[0, answers].log_softmax(-1)
            assert model.last_grids == [grids[row]]
            divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
            assert table.distortion[row, column] == pytest.approx(divergence.item(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llava_next", ["--heal", "lora", "--set", "calibration.heal.steps=3"]),
        ("llava_onevision", ["--load-in", "4bit"]),
    ],
)
def test_it_calibrates_exports_and_answers(
    tiny_tiled: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
    how: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(16):
        (WIDE, TALL, SQUARE)[i % 3].rotate(i).save(f"pictures/{i}.png")
    assert main(["convert", str(tiny_tiled(family, FAMILIES[family])), "-o", "out", "--set", SMALL]) == 0
    settings = {"samples": 16, "epochs": 3, "batch_size": 4, "answer_tokens": 2}
    options = [word for key, value in settings.items() for word in ("--set", f"calibration.{key}={value}")]
    assert main(["calibrate", "--data", "pictures", "--budget", "0.7", *options, *how]) == 0
    assert main(["export", "-o", "exported"]) == 0
    capsys.readouterr()
    _, layout, pyramid = open_converted(Path("out"))
    grids = layout.image_grids([(30, 70)])
    assert len(grids) == 3
    route = [each for each in pyramid.routes_for(grids) if pyramid.can_walk(each, grids[:1])][-1]
    asked = ["run", "what is this ?", "--image", "pictures/0.png", "--max-new-tokens", "3", "--json"]
    asked += ["--route", format_route(route, pyramid.sites)]
    answers = []
    for folder in ("out", "exported"):
        assert main([*asked, "--model", folder]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["visual_tokens"] == [num_tokens(stage) for stage in pyramid.walk(route, grids)]
    assert answers[0]["visual_tokens"][-1] < answers[0]["visual_tokens"][0]
    for key in ("text", "route", "visual_tokens", "flops_fraction"):
        assert answers[0][key] == answers[1][key]
    found = inspect_checkpoint(Path("out"))
    assert found.routes[-1].fraction == pytest.approx(found.pyramid.budgets[-1].fraction, abs=0.03), "of mixed sizes"
    report: dict[str, Any] = json.loads(Path("out/calibration/report.json").read_text())
    assert report["visual_tokens_full"][0] > grids[0][0] * grids[0][1]
