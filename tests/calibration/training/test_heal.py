"""Healing a tiny LLaVA: what is trained, what stays, and that a killed run ends as the uninterrupted one."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dpn_cli.calibration.passes import run_trunk, student_logits, teacher_logits
from dpn_cli.calibration.training import heal as healing
from dpn_cli.calibration.training.heal import heal, heal_loss, trade_offs_around
from dpn_cli.calibration.training.loop import STATE_FILE, Draws, TrainingReport, best_look
from dpn_cli.data.encoding import IGNORED, Example
from dpn_cli.errors import DpnError
from dpn_cli.inference.adapter import adapter_parameters, add_adapter
from dpn_cli.inference.scoring import divergence
from dpn_cli.pyramid.budgets import Budget
from dpn_cli.pyramid.calibration_recipe import HealRecipe
from tests.pyramids import prompt, pyramid

PAD = 3
TRADE_OFFS = (0.3, 3.0)
RECIPE = HealRecipe(
    method="lora", rank=4, steps=6, batch_size=2, gradient_accumulation=2, learning_rate=2e-3, save_every=2
)


@pytest.fixture
def examples() -> list[Example]:
    """Six answered samples; the third has two images, the fourth none."""
    result = []
    for seed, images in enumerate([1, 1, 2, 0, 1, 1]):
        sample = prompt(images, 3 + seed, 5, seed)
        ids = torch.cat([sample["input_ids"][0], torch.arange(50, 53 + seed % 2)])
        labels = ids.clone()
        labels[: len(sample["input_ids"][0])] = IGNORED
        result.append(Example(ids, labels, {name: sample[name] for name in sample if name == "pixel_values"}))
    return result


def run(model: Any, examples: list[Example], recipe: HealRecipe = RECIPE, **options: Any) -> TrainingReport:
    labelled = [True] * len(examples)
    return heal(
        model, examples, labelled, recipe, **{"trade_offs": TRADE_OFFS, "pad_token_id": PAD, "seed": 0, **options}
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def forward(model: Any, example: Example) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=example.input_ids[None], **example.visual).logits


def test_teacher_and_student_are_the_stock_model_and_the_forced_route(make_pair: Any, examples: list[Example]) -> None:
    stock, model = make_pair()
    trunk = run_trunk(model, examples[:2], [True, True], PAD)
    route = (1, 0, 2)
    model.set_route(route)
    teacher = teacher_logits(model, trunk)
    text_model = model.text_model
    student = student_logits(model, trunk, lambda state, site: text_model.take(state, site, [route[site]] * 2))
    at = 0
    for example in examples[:2]:
        answers = (example.labels[1:] != IGNORED).nonzero()[:, 0]
        here = slice(at, at + len(answers))
        at += len(answers)
        assert torch.allclose(teacher[here], forward(stock, example)[0, answers], atol=1e-3)
        with torch.no_grad():
            forced = model(input_ids=example.input_ids[None], **example.visual, labels=example.labels[None])
        assert torch.allclose(student[here], forced.logits[0, answers], atol=1e-3)
        assert trunk.targets[here].tolist() == example.labels[answers + 1].tolist()


def test_only_layers_behind_the_first_site_get_an_adapter(make_pair: Any) -> None:
    _, model = make_pair()
    parameters = add_adapter(model, 4, 8.0, ["q_proj", "down_proj"], seed=0)
    modules = {name.split(".lora_")[0] for name in parameters}
    expected = {
        f"model.language_model.layers.{i}.{m}" for i in range(2, 8) for m in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert modules == expected
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(parameters)


def test_healing_lowers_the_loss_and_leaves_the_base_alone(make_pair: Any, examples: list[Example]) -> None:
    stock, model = make_pair()
    before = weights(model)
    recipe = RECIPE.model_copy(
        update={"steps": 15, "gradient_accumulation": 1, "full_share": 0.0, "learning_rate": 4e-3}
    )
    report = run(model, examples[:2], recipe, trade_offs=[1e3])
    figures = report.summary()
    assert figures["loss_at_last"] < 0.7 * figures["loss_at_first"]
    after = {name.replace(".base_layer", ""): value for name, value in weights(model).items() if ".lora_" not in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with model.teacher():
        assert torch.equal(forward(model, examples[0]), forward(stock, examples[0]))
    model.set_route(model.pyramid.full_route)
    assert not torch.equal(forward(model, examples[0]), forward(stock, examples[0]))


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw8bit", marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_the_uninterrupted_one(
    make_pair: Any, examples: list[Example], tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE.model_copy(
        update={"optimizer": optimizer, "rank": 64, "steps": 4}
    )  # 8-bit state starts at 4096 values
    _, model = make_pair()
    expected = run(model, examples, recipe)
    whole = weights(model)

    _, model = make_pair()
    calls = 0

    def dying(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return heal_loss(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(healing, "heal_loss", dying)
        run(model, examples, recipe, state=tmp_path)

    _, model = make_pair()
    steps: list[int] = []
    resumed = run(model, examples, recipe, state=tmp_path, advance=steps.append)
    assert steps == [2, 1, 1]
    assert resumed == expected
    assert all(torch.equal(whole[name], value) for name, value in weights(model).items())


def test_another_seed_gives_another_adapter_and_a_damaged_state_begins_anew(
    make_pair: Any, examples: list[Example], tmp_path: Path
) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"half a file")
    recipe = RECIPE.model_copy(update={"steps": 2})
    _, model = make_pair()
    first = run(model, examples, recipe, state=tmp_path)
    _, model = make_pair()
    assert run(model, examples, recipe) == first
    _, model = make_pair()
    assert run(model, examples, recipe, seed=1).loss != first.loss


def test_checkpointing_changes_nothing(make_pair: Any, examples: list[Example]) -> None:
    _, model = make_pair()
    recipe = RECIPE.model_copy(update={"steps": 2})
    plain = run(model, examples, recipe)
    _, model = make_pair()
    checkpointed = run(model, examples, recipe.model_copy(update={"gradient_checkpointing": True}))
    assert checkpointed.loss == pytest.approx(plain.loss, rel=1e-5)
    assert not any(module.training for module in model.modules())


def test_checkpointing_recomputes_the_layers(make_pair: Any, examples: list[Example]) -> None:
    _, model = make_pair()
    calls = []
    model.text_model.layers[7].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    one = {"steps": 1, "gradient_accumulation": 1}
    run(model, examples, RECIPE.model_copy(update={**one, "gradient_checkpointing": True}))
    assert len(calls) == 3  # teacher, student, student again


def test_attention_whose_gradients_can_be_nan_is_left_out(
    make_pair: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def loss(*args: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return heal_loss(*args)

    monkeypatch.setattr(healing, "heal_loss", loss)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    _, model = make_pair("llama")
    run(model, examples, RECIPE.model_copy(update={"steps": 1}))
    assert seen and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_a_float32_adapter(make_pair: Any, examples: list[Example], dtype: torch.dtype) -> None:
    _, model = make_pair()
    model.to(dtype)
    report = run(model, examples, RECIPE.model_copy(update={"steps": 2, "gradient_accumulation": 1}))
    assert len(report.loss) == 2
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.float32}
    moved = [p for n, p in adapter_parameters(model).items() if ".lora_B." in n]
    assert all(parameter.abs().sum() > 0 for parameter in moved)


def test_what_did_best_on_held_out_samples_is_kept(make_pair: Any, examples: list[Example]) -> None:
    few = {"steps": 8, "judge_every": 2, "batch_size": 4, "gradient_accumulation": 1}
    recipe = RECIPE.model_copy(update={**few, "learning_rate": 0.3})  # soon leads astray
    _, model = make_pair()
    report = run(model, examples * 11, recipe)
    assert list(report.held_out) == [0, 2, 4, 6, 8]
    assert report.held_out[report.kept] == min(report.held_out.values()) < report.held_out[8]
    figures = report.summary()
    assert figures["kept_after"] == report.kept
    assert figures["held_out_at_kept"] <= figures["held_out_at_first"]


def test_where_every_adapter_does_harm_none_is_kept(
    make_pair: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, model = make_pair()
    before = weights(model)

    def harmful(*args: Any) -> torch.Tensor:
        return -heal_loss(*args) if torch.is_grad_enabled() else heal_loss(*args)

    monkeypatch.setattr(healing, "heal_loss", harmful)
    few = {"steps": 4, "judge_every": 2, "batch_size": 4, "gradient_accumulation": 1}
    report = run(model, examples * 11, RECIPE.model_copy(update=few))
    assert report.kept == 0
    assert not model.is_adapted
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        model.set_route(model.pyramid.full_route)
        assert torch.equal(forward(model, examples[0]), forward(stock, examples[0]))


def test_a_loss_that_is_no_number_ends_the_run(
    make_pair: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, model = make_pair()
    monkeypatch.setattr(healing, "heal_loss", lambda *args: heal_loss(*args) * torch.nan)
    with pytest.raises(DpnError, match=r"stopped at step 1 of 6: the loss is nan.*lower learning_rate"):
        run(model, examples, state=tmp_path)
    assert not list(tmp_path.iterdir())


def test_samples_go_where_their_routers_send_them_and_labels_count_where_they_are_the_datas(
    make_pair: Any, examples: list[Example]
) -> None:
    _, model = make_pair()
    text_model = model.text_model
    recipe = RECIPE.model_copy(update={"ce_weight": 0.5, "temperature": 2.0})
    trunk = run_trunk(model, examples[:2], [True, False], PAD)
    model.pyramid = replace(model.pyramid, trade_off=3.0)
    chosen = []
    for example in examples[:2]:
        with torch.no_grad():
            model(input_ids=example.input_ids[None], **example.visual, labels=example.labels[None])
        chosen += model.last_routes
    model.pyramid = replace(model.pyramid, trade_off=0.0)
    assert any(map(any, chosen))
    teacher = teacher_logits(model, trunk)
    student = student_logits(model, trunk, lambda state, site: text_model.take(state, site, [r[site] for r in chosen]))
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    kl = 4 * (p * (p.log() - q.log())).sum(-1)
    ce = F.cross_entropy(student, trunk.targets, reduction="none")
    first = trunk.answers[0] == 0
    kl = 1 - (-kl).exp()
    expected = ((kl[first] + 0.5 * ce[first]).mean() + kl[~first].mean()) / 2
    assert heal_loss(model, trunk, 3.0, recipe).item() == pytest.approx(expected.item(), rel=1e-4)
    assert heal_loss(model, trunk, 0.0, recipe).item() == pytest.approx(0, abs=1e-5)


def test_divergence_of_two_coins() -> None:
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[torch.tensor(3.0).log(), 0.0]])
    expected = 0.5 * torch.tensor(0.5 / 0.75).log() + 0.5 * torch.tensor(0.5 / 0.25).log()
    assert divergence(student, teacher, 1.0).item() == pytest.approx(expected.item())
    assert divergence(student * 2, teacher * 2, 2.0).item() == pytest.approx(4 * expected.item())


def test_budgets_are_drawn_around_the_budget_on_both_sides() -> None:
    rows = tuple(Budget(1 - 0.02 * i, 1.0 * i, 0.0) for i in range(41))  # the cheapest spends a fifth
    trade_offs = trade_offs_around(pyramid(budgets=rows), 0.6, 0.5)
    assert trade_offs == pytest.approx([10 * (1 - fraction) / 0.2 for fraction in torch.linspace(0.3, 0.9, 9).tolist()])
    within_reach = trade_offs_around(pyramid(budgets=rows), 0.6, 1.0)
    assert (within_reach[0], within_reach[-1]) == (pytest.approx(40), 0)


def test_a_batch_without_images_only_holds_the_teacher(make_pair: Any, examples: list[Example]) -> None:
    _, model = make_pair()
    trunk = run_trunk(model, [examples[3]] * 2, [True, True], PAD)
    assert heal_loss(model, trunk, 3.0, RECIPE).item() == pytest.approx(0, abs=1e-6)


def test_every_sample_is_drawn_once_per_epoch() -> None:
    recipe = RECIPE.model_copy(update={"batch_size": 3, "gradient_accumulation": 2})
    draws = Draws(9, recipe, seed=5)
    rows = [draws.at(step, part).rows for step in range(3) for part in range(2)]
    first, second = [*chain(*rows[:3])], [*chain(*rows[3:])]
    assert sorted(first) == sorted(second) == list(range(9))
    assert first != second
    assert Draws(9, recipe, seed=5).at(2, 1).rows == rows[-1]
    assert draws.at(0, 0).random.random() != draws.at(0, 1).random.random()


@pytest.mark.parametrize(
    ("looks", "kept"),
    [((1.0, 0.95, 1.2), 0), ((1.0, 0.85, 0.7), 50), ((1.0, 0.7, 0.85), 25), ((1.0, 2.0, 3.0), 0), ((0.0, 0.0, 0.0), 0)],
)
def test_an_adapter_is_kept_for_a_clear_gain_alone(looks: tuple[float, ...], kept: int) -> None:
    assert best_look(dict(zip((0, 25, 50), looks, strict=True))) == kept
