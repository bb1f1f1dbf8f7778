"""What a shell offers when the Tab key is pressed: names that dpn knows. No torch."""

from collections.abc import Callable, Iterable, Iterator
from inspect import isclass
from typing import TYPE_CHECKING, get_args

from click import Context, Parameter
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from pydantic import BaseModel

Complete = Callable[[Context, Parameter, str], list[CompletionItem]]


def names(known: Callable[[], Iterable[str]], or_files: bool = False) -> Complete:
    """Offer one of some names, or files too."""

    def complete(ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
        files = [CompletionItem(incomplete, type="file")] if or_files else []
        return [CompletionItem(name) for name in known() if name.startswith(incomplete)] + files

    return complete


def listed(known: Callable[[], Iterable[str]]) -> Complete:
    """Offer names with commas between them, each once."""

    def complete(ctx: Context, param: Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        left = [name for name in known() if name not in before.split(",")]
        return [CompletionItem(f"{before}{comma}{name}") for name in left if name.startswith(last)]

    return complete


def recipe_keys() -> list[str]:
    """Return the start of every `--set KEY=VALUE`."""
    from dpn_cli.pyramid.recipe import Recipe

    return [f"{key}=" for key in _keys(Recipe) if "." in key]


def recipe_names() -> tuple[str, ...]:
    """Return the names of the shipped recipes."""
    from dpn_cli.pyramid.recipe_files import available_recipes

    return available_recipes()


def _keys(model: "type[BaseModel]", prefix: str = "") -> Iterator[str]:
    """Yield the keys of the values in a section of a recipe, and in those below it."""
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        below = next((kind for kind in kinds if isclass(kind) and issubclass(kind, BaseModel)), None)
        if below is None:
            yield f"{prefix}{name}"
        else:
            yield from _keys(below, f"{prefix}{name}.")
