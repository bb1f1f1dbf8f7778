"""The options about data that several commands share."""

from collections.abc import Callable
from dataclasses import fields
from functools import reduce, wraps
from pathlib import Path
from typing import Any

import click

from dpn_cli.checkpoint.source import DEMO
from dpn_cli.commands.completion import names
from dpn_cli.commands.numbers import Percent
from dpn_cli.commands.options import Choice, given_options
from dpn_cli.data.fields import ROLES
from dpn_cli.data.formats import describe_formats
from dpn_cli.errors import UsageError, did_you_mean


class Names(click.ParamType[tuple[str, ...]]):
    """Names with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names."""
        return value if isinstance(value, tuple) else tuple(n for name in value.split(",") if (n := name.strip()))


class Columns(click.ParamType[tuple[tuple[str, str], ...]]):
    """Roles and the fields that have them, as image=picture,question=prompt."""

    name = "columns"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, str], ...]:
        """Return the pairs, or fail."""
        if isinstance(value, tuple):
            return value
        columns: dict[str, str] = {}
        for pair in Names().convert(value, param, ctx):
            role, _, field = (part.strip() for part in pair.partition("="))
            if not field:
                self.fail(f"{pair!r}: expected ROLE=COLUMN, such as image=picture", param, ctx)
            if role not in ROLES:
                self.fail(f"{role!r} is not one of {', '.join(ROLES)}.{did_you_mean(role, ROLES)}", param, ctx)
            if columns.setdefault(role, field) != field:
                self.fail(f"{role} is given twice, as {columns[role]} and as {field}", param, ctx)
        return tuple(columns.items())


allow_urls_option = click.option(
    "--allow-urls", is_flag=True,
    help="Download images that are given as http or https URLs, and keep them in ~/.cache/dpn.",
)  # fmt: skip


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def all_of(*options: Decorator) -> Decorator:
    """Return one decorator that adds several options, to be shown in this order."""
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)


reading_options = all_of(
    click.option(
        "--image-root", type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="The folder that relative image paths start from; default: the folder of the file that holds them.",
    ),
    click.option(
        "--columns", type=Columns(), default=(), metavar="ROLE=COLUMN,…",
        help="Columns (or JSON keys) and the roles to read them in, such as "
        f"image=picture,question=prompt. Roles: {', '.join(ROLES)}; default: columns with known names.",
    ),
    click.option(
        "--ignore-fields", "ignored", type=Names(), default=(), metavar="NAME,NAME,…",
        help="Fields to ignore. An image that is left without text is asked a stock prompt.",
    ),
    allow_urls_option,
    click.option(
        "--stream", is_flag=True,
        help="Stream a hub data set, or parquet and arrow files: read only as many rows as the samples need.",
    ),
)  # fmt: skip
"""The options that say how the rows of data are read; `takes_data` passes them on."""


def takes_data(command: Callable[..., Any]) -> Callable[..., Any]:
    """Make of the options about data, which come by the names of its fields, one `DataOptions`; None without --data."""

    @wraps(command)
    def with_data(*args: Any, data: str | None, **values: Any) -> Any:
        from dpn_cli.data.options import DataOptions

        about = {field.name: values.pop(field.name) for field in fields(DataOptions) if field.name in values}
        if data is None and (idle := given_options(about)):
            raise UsageError(f"{', '.join(idle)} has no effect without --data: pass --data as well, or leave it out")
        return command(*args, data=None if data is None else DataOptions(data, **about), **values)

    return with_data


bad_row_options = all_of(
    click.option(
        "--on-bad-row", type=Choice(["fail", "skip"]), default="fail", show_default=True,
        help="What to do about rows that cannot be used: stop, or leave them out.",
    ),
    click.option(
        "--max-bad", type=Percent(), default="5%", show_default=True,
        help="With --on-bad-row skip: the largest share of bad rows to accept.",
    ),
)  # fmt: skip
"""The options that say what becomes of rows that cannot be used."""


def data_options(command: Callable[..., Any], required: bool = True) -> Callable[..., Any]:
    """Add `--data` and all options that say how it is read, passed on as one `data`."""
    data = click.option(
        "--data", required=required, metavar="DATA", shell_complete=names(lambda: [DEMO], or_files=True),
        help=f"The data: {describe_formats()}.",
    )  # fmt: skip
    return all_of(data, reading_options, bad_row_options)(takes_data(command))
