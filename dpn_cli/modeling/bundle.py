"""Merge the modeling code into the one file that an exported checkpoint carries for remote code. No torch.

One file, because transformers gives every remote module a folder of its own: two modules that import each
other would become two copies, with different classes.
"""

import ast
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dpn_cli import __version__

_PACKAGE = "dpn_cli"
_ROOT = "dpn_cli.modeling.families"
_WIDTH = 120
_HEADER = f"""\
# LLaVA with a dynamic pyramid: visual tokens are reduced at a few depths of the decoder, by experts that small
# routers pick for every sample.
#
# Written by `dpn export` (dpn-cli {__version__}) from the modules named below: edit those, not this file.
# Licence: Apache-2.0.
"""

Import = ast.Import | ast.ImportFrom
Alias = tuple[str, str | None]  # an imported name, and what it is called here if not by its own name


@dataclass(frozen=True)
class Module:
    """A source module `dpn_cli.x.y`: its text and its syntax tree."""

    name: str
    source: str
    tree: ast.Module

    @classmethod
    def parse(cls, name: str, source: str) -> "Module":
        """Parse a module.

        Raises:
            ValueError: if it imports the package in a way that merging would break.
        """
        module = cls(name, source, ast.parse(source, name))
        for node in ast.walk(module.tree):
            if isinstance(node, Import) and _is_ours(node) and not module._can_drop(node):
                raise ValueError(
                    f"{name}, line {node.lineno}: a module that is bundled with an export must import the "
                    "package as `from dpn_cli.x import name`, at the top"
                )
        return module

    @classmethod
    def read(cls, name: str) -> "Module":
        """Parse a module of this package."""
        path = Path(__file__).parents[1].joinpath(*name.split(".")[1:]).with_suffix(".py")
        return cls.parse(name, path.read_text(encoding="utf-8"))

    @property
    def imports(self) -> list[Import]:
        """The import statements at the top level."""
        return [node for node in self.tree.body if isinstance(node, Import)]

    @property
    def needed(self) -> list[str]:
        """The modules of the package that this one imports."""
        return [str(node.module) for node in self.imports if isinstance(node, ast.ImportFrom) and _is_ours(node)]

    def meanings(self) -> dict[str, str]:
        """Return what the statements at the top level make of every name; the package's imports aside."""
        result: dict[str, str] = {}
        for node in self.tree.body:
            if isinstance(node, Import):
                origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                if not _is_ours(node):
                    result |= {a.asname or a.name: f"imported as {origin}{a.name}" for a in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                result[node.name] = f"defined in {self.name}"
            else:
                stored = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
                result |= {n.id: f"defined in {self.name}" for n in stored}
        return result

    def section(self) -> str:
        """Return the module's text without imports, its docstring as comments under a heading."""
        docstring = ast.get_docstring(self.tree) or ""
        dropped = [*self.imports, *(self.tree.body[:1] if docstring else [])]
        gone = {line for node in dropped for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
        kept = [line for i, line in enumerate(self.source.splitlines(), 1) if i not in gone]
        body = "\n".join(kept).strip("\n")
        heading = ["-" * (_WIDTH - 2), self.name.replace(".", "/") + ".py", "", *docstring.splitlines()]
        return "".join(f"# {line}".rstrip() + "\n" for line in heading) + f"\n\n{body}\n"

    def _can_drop(self, node: Import) -> bool:
        """Say whether the names that an import of the package binds are those that the merged file has."""
        renamed = any(alias.asname or alias.name == "*" for alias in node.names)
        return isinstance(node, ast.ImportFrom) and node.level == 0 and node in self.tree.body and not renamed


@cache
def bundle_modeling() -> str:
    """Return the source of one module that does what the modeling package does.

    Raises:
        ValueError: if the modules cannot be merged without changing what a name means.
    """
    return merge_modules(_with_dependencies(_ROOT))


def merge_modules(modules: Sequence[Module]) -> str:
    """Merge modules that come in the order of their dependencies.

    Raises:
        ValueError: if two of them mean different things by one name.
    """
    meanings: dict[str, str] = {}
    for module in modules:
        for name, meaning in module.meanings().items():
            if meanings.setdefault(name, meaning) != meaning:
                raise ValueError(f"{module.name}: {name} is {meaning}, but {meanings[name]} elsewhere")
    imports = _merge_imports(node for module in modules for node in module.imports if not _is_ours(node))
    return "\n".join([_HEADER, imports, *("\n" + module.section() for module in modules)])


def _with_dependencies(root: str) -> list[Module]:
    """Return a module and those of the package that it needs, each after all that it imports."""
    done: dict[str, Module] = {}

    def visit(name: str) -> None:
        if name not in done:
            module = Module.read(name)
            for needed in module.needed:
                visit(needed)
            done[name] = module

    visit(root)
    return list(done.values())


def _is_ours(node: Import) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or _top(node.module or "") == _PACKAGE
    return any(_top(alias.name) == _PACKAGE for alias in node.names)


def _top(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def _merge_imports(nodes: Iterable[Import]) -> str:
    """Return import statements without repetition: first the standard library's, then the others."""
    modules: set[Alias] = set()
    names: dict[str, set[Alias]] = {}
    for node in nodes:
        aliases = {(alias.name, alias.asname) for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.setdefault(str(node.module), set()).update(aliases)
        else:
            modules |= aliases
    lines = [(_top(alias[0]), f"import {_spell(alias)}") for alias in sorted(modules, key=_spell)]
    lines += [(_top(module), _from_import(module, sorted(map(_spell, names[module])))) for module in sorted(names)]
    standard = [line for top, line in lines if top in sys.stdlib_module_names]
    others = [line for top, line in lines if top not in sys.stdlib_module_names]
    return "\n".join([*standard, "", *others, ""])


def _spell(alias: Alias) -> str:
    name, other = alias
    return name if other is None else f"{name} as {other}"


def _from_import(module: str, names: Sequence[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])
