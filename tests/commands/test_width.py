"""Every table that a command prints, with what real models and data bring, is whole in a terminal of 80 columns."""

import ast
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dpn_cli import commands, console
from dpn_cli.calibration.forecast import Forecast
from dpn_cli.calibration.preview import Preview, Shown
from dpn_cli.checkpoint.inspection import Inspection, inspect_checkpoint
from dpn_cli.cli import main
from dpn_cli.commands import convert, data, export, inspect
from dpn_cli.commands.tables import calibration, evaluation, latency
from dpn_cli.conversion.convert import Conversion
from dpn_cli.conversion.convert import convert as convert_model
from dpn_cli.data.findings import Scan
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.evaluation.harness import Benchmark
from dpn_cli.exporting.export import Export
from dpn_cli.pyramid.budgets import Budget
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.recipe_files import load_recipe
from tests.commands.test_tables import made_up_evaluation, made_up_latency
from tests.reports import made_up_report

COLUMNS = 80
SHOWN_WIDE = {"_print_phases", "_print_costs"}  # which only --wide shows
ROUTE = "diverse:0.35+8x8,attended:0.25+2x2,keep,relevant:0.125+8x8,exit"
FOLDER = Path("/srv/checkpoints/llava-onevision-qwen2-7b-ov-hf-dpn")


@pytest.fixture(scope="module")
def conversion(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """A conversion whose pyramid has the many experts of a shipped recipe."""
    done = convert_model(str(tiny_llava), output=tmp_path_factory.mktemp("width") / "tiny-dpn")
    return replace(done, pyramid=large_pyramid())


def large_pyramid() -> PyramidConfig:
    budgets = [Budget(1 - i / 50, 1.23456 * i**2, 0.1234 * i, 1.0) for i in range(45)]
    return replace(load_recipe("llava-1.5-7b").pyramid_config(32), budgets=tuple(budgets))


def large_inspection(conversion: Conversion) -> Inspection:
    found = inspect_checkpoint(conversion.output)
    [full, *_] = found.routes
    layers = tuple(replace(layer, visual_tokens=7371, flops=9.9e11, kv_bytes=987_654_321) for layer in full.layers * 4)
    routes = tuple(replace(full, name=name, layers=layers) for name in ("full", ROUTE, "cheapest"))
    shape = replace(found.layout.shape, num_layers=32)
    return replace(
        found, pyramid=large_pyramid(), routes=routes, grids=((27, 27),) * 10, text_tokens=1234,
        layout=_Layout(shape), sample_from="default",
    )  # fmt: skip


class _Layout:
    def __init__(self, shape: object) -> None:
        self.shape = shape


def large_export(conversion: Conversion) -> Export:
    return Export(
        conversion.output, FOLDER.with_name(f"{FOLDER.name}-export"), replace(large_pyramid(), trade_off=0.634567),
        tuple(map(str, range(12))), 1234, 15_123_456_789, "bf16", "nf4", None, (),
    )  # fmt: skip


def large_preview() -> Preview:
    names = {"conversations_with_a_long_column_name": "conversation", "image": "image", "source_dataset": ""}
    asked = (Shown(1, (("COCO_val2014_000000262148.jpg", 480, 640),), "USER: <image>\nWhat?", "a cat"),)
    cost = Forecast(1e18, 1e12, 1e6, 15_600_000_000, 700_000_000, ("Time: some.", "Memory: some.", "Disk: some."))
    return Preview(
        Scan("LLaVA JSON (`image`, `conversations` as conversation)", 665_298, 512, 512, 0, 3, 400, 2, ()),
        names,
        asked,
        cost,
    )


def benchmarks() -> list[Benchmark]:
    methods = ["original", "dpn at 0.65", "dpn at 0.44", "dpn at 0.25"]
    scores, fractions = dict.fromkeys(methods, 1519.2345), dict.fromkeys(methods, 0.4412)
    names = [("mmbench_en_dev", "gpt_eval_score,none"), ("vizwiz_vqa_val", "exact_match,flexible-extract")]
    return [Benchmark(task, metric, 214_354, scores, fractions) for task, metric in names]


def report_samples() -> list[Sample]:
    return [Sample(str(i), (Image.new("RGB", (8, 8)),), (Turn("What?", "that"),)) for i in range(60)]


PRINTED: dict[str, Callable[[Conversion], object]] = {
    "calibration.print_calibration": lambda _: calibration.print_calibration(made_up_report(report_samples())),
    "evaluation.print_fidelity": lambda _: evaluation.print_evaluation(made_up_evaluation()),
    "evaluation.print_evaluation": lambda _: evaluation.print_evaluation(made_up_evaluation()),
    "evaluation.print_routes": lambda _: evaluation.print_routes(made_up_evaluation(), lambda route: ROUTE),
    "evaluation.print_benchmarks": lambda _: evaluation.print_benchmarks(benchmarks()),
    "latency.print_latency": lambda _: [latency.print_latency(made_up_latency(), real) for real in (False, True)],
    "experts.show_sites": lambda done: convert._show(done, link=False),
    "data._show": lambda _: data._show(large_preview()),
    "data._show_forecast": lambda _: data._show(large_preview()),
    "export._show": lambda done: export._show(large_export(done), budget=0.44),
    "inspect._show": lambda done: inspect._show(large_inspection(done), wide=False),
    "inspect._show_pyramid": lambda done: inspect._show_pyramid(large_pyramid(), wide=False),
    "recipes.command": lambda _: main(["recipes"]),
}  # fmt: skip


def test_no_table_is_forgotten() -> None:
    found = set()
    for path in Path(commands.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name not in {"show", *SHOWN_WIDE}:
                calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                found |= {f"{path.stem}.{function.name}"} if calls & {"console.table", "show"} else set()
    assert found == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_a_table_is_whole_in_a_terminal_of_80_columns(
    name: str, conversion: Conversion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for width in (COLUMNS, 1000):
        monkeypatch.setattr(console, "PLAIN_WIDTH", width)
        PRINTED[name](conversion)
        shown[width] = capsys.readouterr().out
    assert max(map(len, shown[COLUMNS].splitlines())) <= COLUMNS
    assert words(shown[COLUMNS]) == words(shown[1000]), "none is cut"


def words(text: str) -> Counter[str]:
    """Return the words of a text; a route may break after its commas."""
    return Counter(filter(None, re.split(r"[\s─]+|(?<=,)", text)))
