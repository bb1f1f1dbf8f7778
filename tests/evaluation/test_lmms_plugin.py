"""The plugin of lmms-eval, with a stand-in for its base class."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.evaluation.baselines.routes import Original
from dpn_cli.inference.generation import greedy_answers


class Base:
    """What the plugin needs of `lmms_eval.api.model.lmms`."""

    def __init__(self) -> None:
        self.rank = 0
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def make_plugin(make_converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    api = ModuleType("lmms_eval.api.model")
    api.lmms = Base  # type: ignore[attr-defined]
    for name, module in (("lmms_eval", ModuleType("lmms_eval")), ("lmms_eval.api", ModuleType("lmms_eval.api"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, api.__name__, api)
    monkeypatch.delitem(sys.modules, "dpn_cli.evaluation.lmms_plugin", raising=False)
    folder = make_converted()

    def make(**arguments: Any) -> Any:
        from dpn_cli.evaluation.lmms_plugin import DpnLlava

        return DpnLlava(str(folder), device="cpu", **arguments)

    yield make
    sys.modules.pop("dpn_cli.evaluation.lmms_plugin", None)


def test_the_dtype_is_passed_on(make_plugin: Callable[..., Any]) -> None:
    assert str(make_plugin(dtype="bf16").model.dtype) == "torch.bfloat16"


def requests(plugin: Any, samples: list[Any], settings: list[dict[str, Any]]) -> list[Any]:
    """Return one request per sample, as lmms-eval makes them."""
    plugin.task_dict = {"demo": {"test": samples}, "text": {"test": samples}}
    return [
        SimpleNamespace(args=(f"<image>\n{s.turns[0].question}", own, lambda row: row.open_images(), i, "demo", "test"))
        for i, (s, own) in enumerate(zip(samples, settings, strict=True))
    ]


@pytest.mark.parametrize("teacher", [True, False])
def test_answers_are_those_of_generate_in_the_order_of_the_requests(
    make_plugin: Callable[..., Any], tmp_path: Path, teacher: bool
) -> None:
    record = tmp_path / "fractions.json"
    plugin = make_plugin(teacher=teacher, budget=None if teacher else 0.6, batch_size="2", record=str(record))
    samples = list(load_data(DataOptions("demo"), split="heldout", limit=5).samples)
    settings = [{"max_new_tokens": 3 + i % 2, "temperature": 0, "until": ["\n\n"]} for i in range(5)]
    answers = plugin.generate_until(requests(plugin, samples, settings))
    with plugin.method.applied(plugin.model):
        expected = [
            greedy_answers(plugin.model, plugin.processor, [sample], 1, own["max_new_tokens"])[0]
            for sample, own in zip(samples, settings, strict=True)
        ]
    assert answers == expected
    assert len(set(expected)) > 1
    fraction = json.loads(record.read_text())["demo"]
    assert fraction == 1.0 if teacher else fraction < 1.0
    assert isinstance(plugin.method, Original) == teacher


def test_an_answer_ends_before_a_stop_string_and_text_needs_no_image(make_plugin: Callable[..., Any]) -> None:
    plugin = make_plugin()
    sample = load_data(DataOptions("demo"), split="heldout", limit=1).samples[0]
    plugin.task_dict = {"text": {"test": [sample]}}
    request = SimpleNamespace(
        args=(sample.turns[0].question, {"max_new_tokens": 6}, lambda row: None, 0, "text", "test")
    )
    [whole] = plugin.generate_until([request])
    first = whole.split()[0]
    request.args[1]["until"] = whole.split()[1]
    assert plugin.generate_until([request]) == [first]
    assert plugin.fractions["text"] == [1.0, 1.0]


def test_what_it_cannot_do_it_says(make_plugin: Callable[..., Any]) -> None:
    plugin = make_plugin()
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        plugin.loglikelihood([])
    with pytest.raises(TypeError):
        make_plugin(budgets=0.5)
