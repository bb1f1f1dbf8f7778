"""The merged modeling file says what the modules say."""

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from dpn_cli.modeling.bundle import Module, bundle_modeling, merge_modules


def merge(**sources: str) -> str:
    return merge_modules([Module.parse(f"dpn_cli.{name}", source) for name, source in sources.items()])


def test_bundling_needs_no_torch_and_gives_the_same_text_every_time() -> None:
    code = "import sys; from dpn_cli.modeling.bundle import bundle_modeling; sys.stdout.write(bundle_modeling());"
    code += "sys.exit('torch' in sys.modules)"
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
        for _ in range(2)
    )
    assert first == second == bundle_modeling()


def test_the_file_stands_alone(tmp_path: Any) -> None:
    from transformers.dynamic_module_utils import check_imports, get_imports

    file = tmp_path / "modeling_dpn_llava.py"
    file.write_text(bundle_modeling(), encoding="utf-8")
    assert check_imports(file) == []  # no relative imports, and every package is installed
    assert "dpn_cli" not in get_imports(file)


def test_merged_classes_behave_as_their_originals(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tests.pyramids import collate, ragged_batch

    module = ModuleType("modeling_dpn_llava")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(bundle_modeling(), "modeling_dpn_llava.py", "exec"), module.__dict__)

    _, model = make_pair()
    config = module.DpnLlavaConfig.from_dict(model.config.to_dict())
    twin = module.DpnLlavaForConditionalGeneration(config).eval()
    assert twin.load_state_dict(model.state_dict()).missing_keys == []
    assert type(twin.text_model).__module__ == module.__name__
    batch = collate(ragged_batch())
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, model(**batch).logits)
    assert twin.last_routes == model.last_routes
    assert len(set(twin.last_routes)) > 1
    with torch.no_grad(), twin.on_route((1, 0, 1)), model.on_route((1, 0, 1)):
        assert torch.equal(twin(**batch).logits, model(**batch).logits)
        assert twin.last_routes[0] == (1, 0, 1)


def test_merging_drops_own_imports_and_repeats_no_other() -> None:
    merged = merge(
        one='"""First."""\n\nimport math\nfrom os import path\n\nPI = math.pi\n',
        two='"""Second,\n\nat length."""\n\nfrom os import (\n    path,\n    sep,\n)\n'
        "from dpn_cli.one import PI\n\nTAU = 2 * PI  # see one\n",
    )
    assert "dpn_cli.one import" not in merged
    assert merged.count("import path, sep") == merged.count("import ") - 1 == 1
    assert "# First.\n" in merged and "# Second,\n#\n# at length.\n" in merged
    assert "TAU = 2 * PI  # see one" in merged
    namespace: dict[str, Any] = {}
    exec(merged, namespace)
    assert namespace["TAU"] == pytest.approx(6.2832, abs=1e-4)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("def f(): return 1\n", "def f(): return 1\n"),
        ("from math import pi\n", "pi = 3\n"),
        ("from math import log\n", "from cmath import log\n"),
        ("import math as m\n", "for m in (): pass\n"),
    ],
)
def test_one_name_with_two_meanings_is_refused(one: str, two: str) -> None:
    with pytest.raises(ValueError, match=r"dpn_cli\.two: .* elsewhere"):
        merge(one=one, two=two)


@pytest.mark.parametrize(
    "source",
    [
        "import dpn_cli.pyramid.cost\n",
        "from .cost import flops_fraction\n",
        "from dpn_cli.pyramid.cost import flops_fraction as f\n"
        "from dpn_cli.pyramid.cost import *\n"
        "def f():\n    from dpn_cli.pyramid.cost import flops_fraction\n",
    ],
)
def test_imports_that_merging_would_break_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="at the top"):
        merge(one=source)
