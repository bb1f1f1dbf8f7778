"""Recipes as files: the shipped ones, YAML of one's own, what they extend, and what `--set` changes. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpn_cli.errors import RecipeError, did_you_mean
from dpn_cli.limits import MAX_JSON_DEPTH
from dpn_cli.pyramid.recipe import Recipe
from dpn_cli.pyramid.strict_yaml import parse_yaml


def available_recipes() -> tuple[str, ...]:
    """Return the names of the shipped recipes."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file, resolve `extends`, and apply `key.path=value` overrides.

    Raises:
        RecipeError: if there is none, or for every fault in it at once.
    """
    path = _find(name_or_path, beside=Path())
    data = _read(path, chain=())
    for override in overrides:
        apply_override(data, override)
    return Recipe.from_dict(data, where=f"recipe {name_or_path}")


def _folder() -> Path:
    """Return the shipped recipes: inside an installed package, beside it in a source tree."""
    package = Path(__file__).parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _find(name_or_path: str, beside: Path) -> Path:
    if Path(name_or_path).suffix in {".yaml", ".yml"}:
        path = beside / name_or_path
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}")
        return path
    names = available_recipes()
    if name_or_path not in names:
        hint = did_you_mean(name_or_path, names) or f" Known: {', '.join(names)}; or a path that ends in .yaml."
        raise RecipeError(f"no recipe named {name_or_path!r}.{hint}")
    return _folder() / f"{name_or_path}.yaml"


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path in chain:
        raise RecipeError(f"recipe {path} extends itself: {' → '.join(p.name for p in (*chain, path))}")
    data = parse_yaml(path.read_bytes(), where=str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path} must be a mapping of keys to values, found {type(data).__name__}")
    if "extends" not in data:
        return data
    base = data.pop("extends")
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: extends must name one recipe, found {base!r}")
    return _merge(_read(_find(base, beside=path.parent), (*chain, path)), data)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it: mappings merge, all else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply_override(data: dict[str, Any], override: str) -> None:
    """Change one value of a recipe's plain data, in place.

    Args:
        data: Recipe as plain data.
        override: `key.path=value`; the value is YAML.

    Raises:
        RecipeError: if the override is no such pair or leads nowhere.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if len(keys) > MAX_JSON_DEPTH:
        raise RecipeError(f"--set {override:.40}… nests {len(keys)} keys; at most {MAX_JSON_DEPTH} are allowed")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override!r}: expected KEY.PATH=VALUE, as in calibration.samples=256")
    node: Any = data
    for key in keys[:-1]:
        node = node.setdefault(key, {}) if isinstance(node, dict) else _item(node, key, override)
    if isinstance(node, dict):
        node[keys[-1]] = parse_yaml(text, where=f"--set {override}")
    else:
        _item(node, keys[-1], override)
        node[int(keys[-1])] = parse_yaml(text, where=f"--set {override}")


def _item(node: Any, key: str, override: str) -> Any:
    if not isinstance(node, list) or not key.isdecimal() or int(key) >= len(node):
        raise RecipeError(f"--set {override!r}: there is no {key!r} there")
    return node[int(key)]
