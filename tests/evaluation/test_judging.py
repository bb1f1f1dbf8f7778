"""Results against stock transformers, batches against single samples, and going on after a kill."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dpn_cli.data.encoding import prompts
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.errors import CheckpointError
from dpn_cli.evaluation.baselines.routes import FixedRoute, Original, Routed
from dpn_cli.evaluation.baselines.static import StaticPyramid
from dpn_cli.evaluation.judging import TEACHER, Evaluator, SampleResult
from dpn_cli.evaluation.kept import KeptResults
from dpn_cli.inference.generation import forced_texts, greedy_answers
from dpn_cli.inference.loading import load_model


def questions(count: int = 5) -> list[Sample]:
    """Return samples of different lengths: labelled or not, one with two images, one with an earlier turn."""
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (count + 1, 48, 48, 3), dtype=torch.uint8, generator=noise).numpy()
    images = [Image.fromarray(each) for each in pixels]
    found = [Sample(str(i), (images[i],), (Turn("what is " * (i + 1), "red circle", 1),), "even") for i in range(count)]
    found[1] = Sample("1", (images[1],), (Turn("which colour ?", None, 1),), "odd")
    found[2] = Sample("2", (images[2], images[-1]), (Turn("what are these ?", "blue", 2),), "even")
    found[3] = Sample("3", (images[3],), (Turn("what ?", "circle", 1), Turn("how many ?", None)), "odd")
    return found


@pytest.fixture
def folder(make_converted: Callable[..., Path]) -> Path:
    return make_converted()


def evaluator(folder: Path, batch_size: int = 2, kept: KeptResults | None = None) -> Evaluator:
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    return Evaluator(load_model(folder), processor, batch_size, answer_tokens=4, kept=kept)


def judge(asked: Evaluator, methods: Any, samples: list[Sample]) -> list[list[SampleResult]]:
    return asked.judge(methods, samples, asked.sizes(samples), lambda done: None)


def test_results_are_those_of_stock_transformers(folder: Path, tiny_llava: Path) -> None:
    asked, sample = evaluator(folder), questions()[0]
    method = FixedRoute(asked.model.pyramid, (0, 1, 1, 0, 0))
    [[result]] = judge(asked, [method], [sample])

    stock = LlavaForConditionalGeneration.from_pretrained(tiny_llava).eval()
    inputs = prompts([sample], asked.processor)
    answer = asked.processor.tokenizer(" red circle", add_special_tokens=False, return_tensors="pt").input_ids
    answer = torch.cat([answer, torch.tensor([[asked.processor.tokenizer.eos_token_id]])], 1)
    ids, count = torch.cat([inputs["input_ids"], answer], 1), answer.shape[1]
    asked.model.set_route((0, 1, 1, 0, 0))
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    with torch.no_grad():
        theirs = stock(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -count - 1 : -1].log_softmax(-1)
        ours = asked.model(input_ids=ids, pixel_values=inputs["pixel_values"], labels=labels).logits
        generated = asked.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    ours = ours[0, -count - 1 : -1].log_softmax(-1)
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert result.distortion == pytest.approx(expected, rel=1e-3) and expected > 0.01
    assert result.agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
    text = asked.processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert result.answer == text.strip()
    assert result.visual_tokens == (144 + 72 + 18 * 6) / 8


def test_the_teacher_loses_nothing(folder: Path) -> None:
    asked = evaluator(folder)
    [results] = judge(asked, [Original()], questions())
    assert [(r.distortion, r.agreement, r.fraction) for r in results] == [(0.0, 1.0, 1.0)] * 5
    with asked.model.teacher():
        expected = greedy_answers(asked.model, asked.processor, questions(), 2, answer_tokens=4)
    assert [r.answer for r in results] == asked.teacher_answers == expected


def test_the_teacher_generates_only_what_the_labels_have_not_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, samples = evaluator(folder), [sample for sample in questions() if len(sample.turns) == 1]
    with asked.model.teacher():
        expected = greedy_answers(asked.model, asked.processor, samples, 2, answer_tokens=4)
    labelled = [
        replace(sample, turns=(replace(sample.turns[0], answer=answer),))
        for sample, answer in zip(samples, expected, strict=True)
    ]
    monkeypatch.setattr(asked.model, "generate", None)
    assert judge(asked, [], labelled) == [] and asked.teacher_answers == expected


def test_a_model_whose_weights_are_no_numbers_is_a_bad_checkpoint(folder: Path) -> None:
    asked = evaluator(folder)
    with torch.no_grad():
        asked.model.lm_head.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' holds NaN"):
        judge(asked, [Original()], questions())


def test_batches_do_not_matter(folder: Path) -> None:
    methods = [Routed(0.7), StaticPyramid("fastv", 0.4)]
    alone, together = (judge(evaluator(folder, size), methods, questions()) for size in (1, 5))
    for one, five in zip(alone, together, strict=True):
        for a, b in zip(one, five, strict=True):
            assert (a.answer, a.agreement, a.fraction, a.route) == (b.answer, b.agreement, b.fraction, b.route)
            assert a.distortion == pytest.approx(b.distortion, abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 5.0}])
def test_answers_are_what_would_be_generated(
    folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = evaluator(folder, batch_size=3)
    for name, value in settings.items():
        setattr(asked.model.generation_config, name, value)
    samples = [replace(sample, turns=(replace(sample.turns[0], answer=None),)) for sample in questions()]
    method = Routed(0.7)
    with method.applied(asked.model):
        expected = greedy_answers(asked.model, asked.processor, samples, 2, answer_tokens=4)
    generated: list[int] = []
    generate = asked.model.generate
    monkeypatch.setattr(
        asked.model, "generate", lambda **inputs: generated.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    known = [*expected[:3], "circle", None]  # answers of the data: three that the pyramid gives, one that it does not
    labelled = [
        sample if answer is None else sample.answered(answer) for sample, answer in zip(samples, known, strict=True)
    ]
    asked.known[TEACHER] = expected[::-1]
    [results] = judge(asked, [method], labelled)
    assert [result.answer for result in results] == expected
    assert sum(generated) == (5 if settings else 2)


def test_an_answer_is_known_only_where_generating_ends_with_it(folder: Path) -> None:
    asked = evaluator(folder)
    labels, likely = torch.tensor([[-100, 7, 8, 2], [-100, -100, 9, 2]]), torch.tensor([7, 8, 2, 9, 7])
    tokenizer = asked.processor.tokenizer
    for ends, most, expected in ((2, 4, {0: [7, 8]}), ([5, 2], 4, {0: [7, 8]}), (5, 4, {}), (5, 1, {0: [7], 1: [9]})):
        asked.model.generation_config.eos_token_id = ends
        known = forced_texts(asked.model, tokenizer, labels, likely, max_new_tokens=most)
        assert known == {row: tokenizer.decode(tokens) for row, tokens in expected.items()}


def test_sizes_are_what_the_model_sees(folder: Path) -> None:
    asked, samples = evaluator(folder), questions()
    seen: list[Any] = []
    with torch.no_grad(), asked.model.reduced_by(lambda state, site: seen.append(state) or state):
        asked.model(**prompts(samples, asked.processor))
    sizes = asked.sizes(samples)
    assert tuple(size.grids for size in sizes) == seen[0].image_grids
    assert tuple(size.text_tokens for size in sizes) == seen[0].text_tokens


def test_results_are_kept_batch_by_batch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, methods = questions(), [Routed(0.7), StaticPyramid("fastv", 0.4)]
    undisturbed = judge(evaluator(folder), methods, samples)
    monkeypatch.chdir(tmp_path)
    kept = KeptResults({"a": 1}, print)

    finished: list[int] = []

    def interrupt(done: int) -> None:
        finished.append(done)
        if len(finished) == 2:
            raise KeyboardInterrupt

    first = evaluator(folder, kept=kept)
    with pytest.raises(KeyboardInterrupt):
        first.judge(methods, samples, first.sizes(samples), interrupt)
    damaged, _ = sorted(kept.folder.iterdir())
    damaged.write_text("{")

    second = evaluator(folder, kept=kept)
    asked: list[int] = []
    generate = second.model.generate
    monkeypatch.setattr(
        second.model, "generate", lambda **inputs: asked.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    resumed = judge(second, methods, samples)
    assert resumed == undisturbed
    assert sum(asked) == 3 * (2 + 1), "the teacher and two methods answer the damaged batch and the last sample"
    assert judge(evaluator(folder, kept=KeptResults({"a": 2}, print)), methods[:1], samples)
    assert all(json.loads(path.read_text())["results"] for path in kept.folder.iterdir())
    kept.drop()
    assert not kept.folder.exists()
