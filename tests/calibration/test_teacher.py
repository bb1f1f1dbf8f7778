"""Another checkpoint as the teacher: what it answers and measures is its own, whatever it looks like."""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.filesize import decimal
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from dpn_cli import cli
from dpn_cli.calibration import calibrate as calibration
from dpn_cli.calibration import job
from dpn_cli.calibration.other_teacher import OtherTeacher
from dpn_cli.calibration.passes import run_trunk, teacher_logits
from dpn_cli.calibration.rollout import RouteTable, RouteTree, measure, plan_batches
from dpn_cli.calibration.teacher import Teacher
from dpn_cli.calibration.training.heal import heal
from dpn_cli.checkpoint.headers import Checkpoint, read_json
from dpn_cli.conversion.convert import convert
from dpn_cli.data.encoding import IGNORED, VISUAL, Encoded
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.exporting.export import export
from dpn_cli.inference.loading import load_model, load_processor
from dpn_cli.notation import nats, percent
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe, HealRecipe
from tests.conftest import VOCAB_SIZE, tiny_tokenizer
from tests.originals import Original
from tests.pyramids import pyramid
from tests.runs import DEADLOCK_S, FEW, digests, noise_pictures, options, start, wait_for

ANSWERS = ("red circle", "word7", "two small green square", "blue")
RECIPE = CalibrationRecipe(answer_tokens=3, batch_size=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures without answers, so that the teacher is asked."""
    return noise_pictures(tmp_path_factory.mktemp("pictures"), 16)


@pytest.fixture(scope="module")
def samples(data: Path) -> list[Sample]:
    """Samples with answers, the third longer than it may be."""
    return [
        Sample(str(i), (data / f"{i:02}.png",), (Turn("what is this ?", answer),)) for i, answer in enumerate(ANSWERS)
    ]


@pytest.fixture(scope="module")
def converted(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(str(tiny_llava), output=tmp_path_factory.mktemp("converted") / "tiny-dpn").output


@pytest.fixture(scope="module")
def calibrated(converted: Path, data: Path, other_llava: Path) -> Path:
    """A checkpoint that another model has taught."""
    folder = Path(shutil.copytree(converted, converted.with_name("calibrated")))
    assert cli.main(arguments(folder, data, other_llava)) == 0
    return folder


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "tiny-dpn"))


def arguments(folder: Path, data: Path, teacher: Path | str | None, *further: str) -> list[str]:
    line = ["calibrate", "--model", str(folder), "--data", str(data), "--budget", "0.6", *options(FEW)]
    return [*line, *(["--teacher", str(teacher)] if teacher else []), *further]


def opened(teacher: Path, recipe: CalibrationRecipe = RECIPE) -> Teacher:
    return OtherTeacher.open(str(teacher)).load("float32", recipe, "cpu")


def answer_log_probs(folder: Path, sample: Sample, prompt: str) -> torch.Tensor:
    """Return what the stock model makes of a sample's answer after a prompt that is written out, [A, V]."""
    processor = AutoProcessor.from_pretrained(folder)
    stock = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    image = Image.open(str(sample.images[0]))
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    answer = processor.tokenizer.encode(str(sample.turns[0].answer), add_special_tokens=False)
    answer = [*answer, processor.tokenizer.eos_token_id][: RECIPE.answer_tokens]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    with torch.no_grad():
        logits = stock(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
    return logits[-len(answer) - 1 : -1, :VOCAB_SIZE].log_softmax(-1)


STUDENT = "USER: <image>\nwhat is this ? ASSISTANT:"
TEACHER = f"describe the picture . {STUDENT}"


def test_answers_and_distances_are_those_of_the_other_model(
    tiny_llava: Path, converted: Path, other_llava: Path, samples: Sequence[Sample]
) -> None:
    teacher, model, processor = opened(other_llava), load_model(converted), load_processor(converted)
    stock = LlavaForConditionalGeneration.from_pretrained(other_llava)
    theirs = AutoProcessor.from_pretrained(other_llava)
    for sample, answer in zip(samples, teacher.answers(samples, 2), strict=True):
        inputs = theirs(text=TEACHER, images=Image.open(str(sample.images[0])), return_tensors="pt")
        ids = stock.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == theirs.decode(ids, skip_special_tokens=True).strip()

    table = measured(model, Encoded(samples, processor, RECIPE.answer_tokens), teacher)
    for i, sample in enumerate(samples):
        expected = answer_log_probs(other_llava, sample, TEACHER)
        ours = answer_log_probs(tiny_llava, sample, STUDENT)
        distance = F.kl_div(ours, expected, log_target=True, reduction="none").sum(-1).mean()
        same = (ours.argmax(-1) == expected.argmax(-1)).float().mean()
        assert table.distortion[i, 0] == pytest.approx(distance.item(), abs=1e-3)
        assert table.agreement[i, 0] == pytest.approx(same.item())
    assert (table.distortion[:, 0] > 0.1).all()
    assert (table.loss.distortion[:, 0] == 0).all(), "routers predict what routes lose against the full one"
    added = table.distortion - table.distortion[:, :1]
    assert torch.allclose(table.loss.distortion, 1 - (-added.clamp(min=0)).exp()) and (added > 0).any()


def measured(model: Any, examples: Encoded, teacher: Teacher | None) -> RouteTable:
    model.rebuild(pyramid())
    grids = [((12, 12),)] * len(examples)
    tree = RouteTree.of(model.pyramid, grids)
    return measure(model, examples, tree, plan_batches(tree, model.pyramid, grids, 2, None), 3, other=teacher)


def test_the_original_as_the_teacher_gives_the_same_table(
    tiny_llava: Path, converted: Path, samples: Sequence[Sample]
) -> None:
    model, examples = load_model(converted), Encoded(samples, load_processor(converted), RECIPE.answer_tokens)
    plain, taught = (measured(model, examples, teacher) for teacher in (None, opened(tiny_llava)))
    assert torch.equal(taught.agreement, plain.agreement)
    for ours, expected in ((taught, plain), (taught.loss, plain.loss)):
        assert torch.allclose(ours.distortion, expected.distortion, atol=1e-4)


def test_a_folder_of_dpn_teaches_as_the_model_that_was_converted(
    tiny_llava: Path, converted: Path, samples: Sequence[Sample]
) -> None:
    examples = Encoded(samples, load_processor(converted), RECIPE.answer_tokens)
    first, second = (opened(each).log_probs(list(examples), VOCAB_SIZE) for each in (tiny_llava, converted))
    assert torch.allclose(first, second, atol=1e-5)
    assert first.shape == (3 + 2 + 3 + 2, VOCAB_SIZE), "with the ends of the short answers"


def test_healing_learns_from_the_other_model(converted: Path, other_llava: Path, samples: Sequence[Sample]) -> None:
    pytest.importorskip("peft")
    teacher, model = opened(other_llava), load_model(converted)
    examples = Encoded(samples, load_processor(converted), RECIPE.answer_tokens)
    words = Encoded([Sample("words", (), (Turn("what is red ?", "blue"),))], examples.processor, RECIPE.answer_tokens)
    assert torch.equal(run_trunk(model, [*words], [True], 3, teacher).taught, teacher.log_probs([*words], VOCAB_SIZE))
    trunk = run_trunk(model, list(examples), [True] * 4, 3, teacher)
    goal = teacher.log_probs(list(examples), VOCAB_SIZE)
    assert torch.equal(teacher_logits(model, trunk), goal)
    recipe = HealRecipe(method="lora", steps=5, batch_size=4, gradient_accumulation=1, learning_rate=2e-2, full_share=1)
    report = heal(model, examples, [True] * 4, recipe, trade_offs=[1.0], pad_token_id=3, seed=0, other=teacher)
    assert report.loss[-1] < 0.8 * report.loss[0], "the full route comes nearer to the other model, too"


def test_the_teacher_is_on_record_by_its_name(
    calibrated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = read_json(calibrated / "calibration" / "report.json")
    assert report["settings"]["teacher"] == "other-llava"
    assert report["full"]["distortion"] > 0.1 and report["full"]["agreement"] < 1
    assert report["budgets"][0]["distortion"] > 0.1, "distances from the teacher, not from the full route"
    pyramid = load_model(calibrated).pyramid
    assert pyramid.mean_losses[0] == 0 and max(pyramid.mean_losses) > 0, "what routes add"
    exported = export(calibrated, tmp_path / "export").output
    card = (exported / "README.md").read_text()
    assert "against the teacher `other-llava`" in card
    texts = "".join(file.read_text() for file in exported.iterdir() if file.suffix in (".json", ".md"))
    assert str(tmp_path.parent) not in texts
    copy = shutil.copytree(calibrated, tmp_path / "copy")
    assert cli.main(["eval", "--model", str(copy), "--data", str(data), "--max-new-tokens", "2"]) == 0
    assert "was calibrated against another model, other-llava" in " ".join(capsys.readouterr().err.split())


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_memory_of_both_is_stated_before_either_is_loaded(
    folder: Path, data: Path, other_llava: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_frozen", interrupt)
    assert cli.main(arguments(folder, data, other_llava)) == 130
    said = " ".join(capsys.readouterr().err.split())
    size = decimal(Checkpoint.open(other_llava).nbytes)
    assert f" of memory for the model and {size} for the teacher other-llava, together" in said


def test_an_unfinished_calibration_goes_on_with_the_same_teacher_alone(
    folder: Path, calibrated: Path, data: Path, other_llava: Path, tiny_llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "budget_table", interrupt)
        assert cli.main(arguments(folder, data, other_llava)) == 130
    for another in (None, tiny_llava):
        capsys.readouterr()
        assert cli.main(arguments(folder, data, another)) == 2
        assert "other values of teacher" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "log_probs", None)  # all that is needed has been measured
        assert cli.main(arguments(folder, data, other_llava)) == 0
    assert digests(folder) == digests(calibrated)
    assert_distance_of_the_full_route_is_shown(folder, capsys.readouterr().out)


def assert_distance_of_the_full_route_is_shown(folder: Path, output: str) -> None:
    assert "the teacher's first choice (95%" in " ".join(output.split())
    full = read_json(folder / "calibration" / "report.json")["full"]
    [row] = [line for line in output.splitlines() if "every token kept" in line]
    assert nats(full["distortion"]) in row and percent(full["agreement"]) in row
    page = (folder / "calibration" / "report.html").read_text()
    assert "KL from the teacher" in page and "KL from the original" not in page


def test_budgets_are_solved_against_a_teacher_that_is_given_then(
    calibrated: Path, data: Path, other_llava: Path, tmp_path: Path
) -> None:
    folder, figures = Path(shutil.copytree(calibrated, tmp_path / "tiny-dpn")), []
    for further in (["--teacher", str(other_llava)], []):
        line = ["calibrate", "--model", str(folder), "--data", str(data), "--samples", "6", "--budgets-only", *further]
        assert cli.main(line) == 0
        report = read_json(folder / "calibration" / "report.json")
        figures.append((report["settings"]["budgets_solved_on"]["teacher"], report["full"]["distortion"] > 0))
    assert figures == [("other-llava", True), (None, False)]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_model_that_cuts_images_teaches_one_that_does_not(
    family: str, converted: Path, tiny_tiled: Callable[..., Path], samples: Sequence[Sample]
) -> None:
    folder, model = tiny_tiled(family), load_model(converted)
    teacher, examples = opened(folder), Encoded(samples, load_processor(converted), RECIPE.answer_tokens)
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    taught = run_trunk(model, [examples[0]], [True], 3, teacher).taught
    inputs = teacher.processor(text=STUDENT, images=Image.open(str(samples[0].images[0])), return_tensors="pt")
    answer = examples[0].labels[examples[0].labels != IGNORED]
    text = {"input_ids": torch.cat([inputs.pop("input_ids")[0], answer])[None]}
    visual = {name: value for name, value in inputs.items() if name in VISUAL}
    with torch.no_grad():
        logits = stock(**text, **visual).logits[0, -len(answer) - 1 : -1]
    assert taught is not None and torch.allclose(taught, logits[:, :VOCAB_SIZE].log_softmax(-1), atol=1e-3)


@pytest.mark.slow
def test_healing_and_two_processes_go_on_with_the_teacher_and_end_as_one_does(
    folder: Path, data: Path, other_llava: Path
) -> None:
    pytest.importorskip("peft")
    settings = ("heal.method=lora", "heal.steps=4", "heal.batch_size=2", "heal.gradient_accumulation=2")
    further = [word for each in settings for word in ("--set", f"calibration.{each}")]
    plain = Path(shutil.copytree(folder, folder.with_name("plain")))
    assert cli.main(arguments(plain, data, other_llava, *further)) == 0
    process = start(arguments(folder, data, other_llava, *further, "--num-processes", "2"))
    wait_for(process, lambda: any((folder / "calibration" / "state").glob("*")))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLOCK_S)
    assert process.returncode == 130
    process = start(arguments(folder, data, other_llava, *further, "--num-processes", "2"))
    errors = process.communicate(timeout=DEADLOCK_S)[1]
    assert process.returncode == 0, errors
    assert "MB in every process" in errors
    assert digests(folder) == digests(plain)


def test_a_teacher_that_cannot_run_is_refused(
    folder: Path, data: Path, other_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(other_llava, tmp_path / "broken"))
    config = read_json(broken / "config.json")
    config["text_config"]["hidden_act"] = "none such"
    (broken / "config.json").write_text(json.dumps(config))
    assert "hidden_act 'none such', which does not work" in refused(folder, data, broken, capsys)


def refused(folder: Path, data: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the reason, on one line."""
    before = digests(folder)
    assert cli.main(arguments(folder, data, teacher)) == 3
    assert digests(folder) == before and not (folder / "calibration").exists()
    return " ".join(capsys.readouterr().err.split())


def test_another_vocabulary_is_refused(
    folder: Path, data: Path, with_tokenizer: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["violet"])
    reason = refused(folder, data, with_tokenizer(tokenizer), capsys)
    assert "has another vocabulary than" in reason and "'violet', id 304 there and missing here" in reason


def test_other_tokens_of_the_same_answer_are_refused(
    folder: Path, data: Path, with_tokenizer: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"
    assert "tokenises an answer differently from" in refused(folder, data, with_tokenizer(tokenizer), capsys)


def test_a_layout_that_has_to_be_rewritten_is_refused(
    folder: Path, data: Path, make_original: Callable[..., Original], capsys: pytest.CaptureFixture[str]
) -> None:
    original = make_original()
    original.edit(mm_vision_tower=str(original.clip))
    assert "not in Hugging Face's layout in safetensors: `dpn convert` it" in refused(
        folder, data, original.folder, capsys
    )


def test_samples_that_only_the_teacher_cannot_take_are_refused(
    folder: Path, data: Path, other_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = Path(shutil.copytree(other_llava, tmp_path / "short"))
    config = read_json(short / "config.json")
    config["text_config"]["max_position_embeddings"] = 62
    (short / "config.json").write_text(json.dumps(config))
    assert cli.main(arguments(folder, data, short)) == 4
    assert "for the teacher" in capsys.readouterr().err
