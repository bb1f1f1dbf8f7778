"""Imports go one way: a package imports only what stands before it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import dpn_cli

ORDER = [
    "errors", "extras", "limits", "reporter", "intervals", "notation", "demo", "pyramid", "families", "modeling",
    "checkpoint", "workspace", "data", "pages", "inference", "conversion", "parallel", "calibration", "exporting",
    "evaluation", "channels", "console", "commands", "cli", "start",
]  # fmt: skip
"""From the ground up. `modeling` goes along with exports: it needs nothing of `checkpoint` or above."""

APART = {("calibration", "exporting"), ("calibration", "evaluation"), ("exporting", "evaluation")}
"""Neighbours that share through what stands before them, and do not know each other."""

ROOT = Path(dpn_cli.__file__).parent


def part(module: str) -> str:
    return module.split(".")[1]


def imports() -> Iterator[tuple[str, str, str]]:
    """Yield the file, its part of the package and the part that it imports, wherever the import stands."""
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpn_cli."):
                yield str(path.relative_to(ROOT)), own, part(str(node.module))
            elif isinstance(node, ast.ImportFrom) and node.module == "dpn_cli":
                names = (alias.name for alias in node.names if not alias.name.startswith("__"))
                yield from ((str(path.relative_to(ROOT)), own, name) for name in names)


def test_no_part_imports_one_that_stands_after_it() -> None:
    seen = set()
    for file, own, other in imports():
        seen.add(other)
        if own not in ("__init__", "__main__", other):  # the package's own face
            assert ORDER.index(other) < ORDER.index(own), f"{file} imports {other}, which stands after {own}"
    assert seen <= set(ORDER)


def test_calibration_exporting_and_evaluation_do_not_know_each_other() -> None:
    for file, own, other in imports():
        assert not {(own, other), (other, own)} & APART, f"{file} imports {other}"


def test_every_part_has_its_place() -> None:
    parts = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__init__", "__main__", "__pycache__"} == set(ORDER)
