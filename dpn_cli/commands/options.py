"""What several commands share: the option that names a checkpoint, and stricter parameter types."""

import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dpn_cli import console, workspace
from dpn_cli.checkpoint.headers import DTYPES, check_folder
from dpn_cli.commands.completion import names, recipe_keys
from dpn_cli.commands.numbers import WholeNumber
from dpn_cli.errors import UsageError, did_you_mean
from dpn_cli.evaluation.baselines import BASELINES
from dpn_cli.limits import MAX_SAMPLES, MAX_SEED
from dpn_cli.parallel.launch import is_launched, launch, place, speaks
from dpn_cli.pyramid.experts import KINDS


def model_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--model DIR`; pass its value through `checkpoint_folder`."""
    option = click.option(
        "--model",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="The checkpoint folder; default: the last one that was converted or calibrated.",
    )
    return option(command)


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one recipe value; repeatable.",
    shell_complete=names(recipe_keys),
)  # fmt: skip
teacher_option = click.option(
    "--teacher", metavar="PATH|ID",
    help="Another LLaVA with the same tokenizer, such as a larger one, that answers and that results are measured "
    "against; default: the model itself with its pyramid off.",
)  # fmt: skip
SAMPLES, SEED = WholeNumber(1, MAX_SAMPLES), WholeNumber(0, MAX_SEED)
CALIBRATION_SAMPLES = WholeNumber(2, MAX_SAMPLES)  # as in a recipe
wide_option = click.option("--wide", is_flag=True, help="Show all columns, even if they do not fit the terminal.")


def dtype_option(default: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option `--dtype`, which a model is computed in; without a default the recipe's counts."""
    otherwise = "" if default else "; default: the recipe's"
    return click.option(
        "--dtype", type=Choice(["auto", *DTYPES]), default=default, show_default=default is not None,
        help="Dtype to compute in; auto takes the checkpoint's, or float32 on a CPU that only emulates it, if memory "
        f"allows{otherwise}.",
    )  # fmt: skip


def processes_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--num-processes`: the command line runs in so many processes, which the command itself does not see."""

    @click.option(
        "--num-processes", type=WholeNumber(min=1), default=1, show_default=True,
        help="Number of processes on this machine that share the work; each takes one GPU if there are GPUs.",
    )  # fmt: skip
    @wraps(command)
    def launched(*args: Any, num_processes: int, **kwargs: Any) -> Any:
        if num_processes > 1 and not is_launched():
            click.get_current_context().exit(launch(sys.argv[1:], num_processes))
        if place()[0] > 0:
            console.hush()
        return command(*args, **kwargs)

    return launched


@contextmanager
def together() -> Iterator[None]:
    """Make an error of one of the processes that share a command's work an error of all, which the first one says."""
    if not is_launched():
        yield
        return
    from dpn_cli.parallel.processes import Processes

    with Processes.join(console.aloud if speaks() else console.note).as_one():
        yield


def checkpoint_folder(model: Path | None) -> Path:
    """Return the checkpoint to act on; say which one when the user named none.

    Raises:
        UsageError: if there is no current one.
        CheckpointError: if there is no checkpoint in the folder.
    """
    folder = workspace.current(model)
    check_folder(folder)
    if model is None:
        console.note(f"Checkpoint: {folder}")
    return folder


def baseline_names(against: str) -> tuple[str, ...]:
    """Read the names of baselines in an `--against`.

    Raises:
        UsageError: if a name is unknown.
    """
    names = [name.strip() for name in against.split(",") if name.strip()]
    for name in names:
        if name not in (*BASELINES, "all"):
            known = ", ".join((*BASELINES, "all"))
            raise UsageError(f"--against {name!r} is not one of {known}.{did_you_mean(name, BASELINES)}")
    return tuple(BASELINES) if "all" in names else tuple(dict.fromkeys(names))


class Kinds(click.ParamType[str]):
    """Kinds of experts, separated by commas."""

    name = "kinds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value, or fail with a suggestion."""
        known = Choice(list(KINDS))
        for kind in str(value).split(","):
            known.convert(kind.strip(), param, ctx)
        return str(value)


class Choice(click.Choice[str]):
    """A choice that suggests the value which may have been meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value, or fail with a suggestion."""
        if isinstance(value, str) and value not in self.choices:
            known = ", ".join(self.choices)
            self.fail(f"{value!r} is not one of {known}.{did_you_mean(value, self.choices)}", param, ctx)
        return super().convert(value, param, ctx)


class Size(click.ParamType[tuple[int, int]]):
    """Height and width in pixels, as 672x672."""

    name = "HxW"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return what stands for it in the help, as it is written."""
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return both, or fail."""
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", str(value))
        if match is None:
            self.fail(f"{value!r} is not a size: expected height and width in pixels, such as 480x640", param, ctx)
        from dpn_cli.data.images import size_fault

        height, width = int(match[1]), int(match[2])
        if fault := size_fault(width, height):
            self.fail(f"images of {value} are not read: {fault.detail}", param, ctx)
        return height, width


def given_options(names: Collection[str]) -> list[str]:
    """Return which of the current command's parameters the user has given, as they are spelt on a command line."""
    context = click.get_current_context()
    return [
        parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
