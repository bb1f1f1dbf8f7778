"""Numbers on the command line: the types of options, whose names are those of help and messages."""

import math
from typing import Any

import click


class WholeNumber(click.IntRange):
    """A whole number in a range."""

    name = "whole number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return what stands for it in the help."""
        return "N"


class Fraction(click.FloatRange):
    """A number above 0 and at most 1; not `nan`, which click's FloatRange accepts."""

    name = "number"

    def __init__(self) -> None:
        super().__init__(min=0, max=1, min_open=True)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return what stands for it in the help."""
        return "X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class Percent(click.ParamType[float]):
    """A share from 0 to 1, as 0.05 or 5%."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share, or fail."""
        text = str(value)
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            self.fail(f"{value!r} is not a share: expected something like 5% or 0.05", param, ctx)
        return share
