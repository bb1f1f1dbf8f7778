"""The errors that a user is meant to read, each with the exit code the command line gives it."""

from collections.abc import Iterable
from difflib import get_close_matches


class DpnError(Exception):
    """Something went wrong that one sentence can explain: what was found, what was expected, what to do."""

    exit_code = 1


class UsageError(DpnError):
    """The request itself cannot be carried out (an existing output, an impossible option)."""

    exit_code = 2


class RouteError(UsageError, ValueError):
    """A route does not fit the pyramid; to callers in Python it is a `ValueError`."""


class RecipeError(DpnError):
    """A recipe does not parse or does not fit the model."""

    exit_code = 2


class CheckpointError(DpnError):
    """A checkpoint is missing, damaged, or of a kind that cannot be used here."""

    exit_code = 3


class DataError(DpnError):
    """The calibration or evaluation data cannot be used."""

    exit_code = 4


class MissingExtraError(DpnError):
    """A feature needs a package that is not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs the package {package}: install it with  pip install 'dpn-cli[{extra}]'")


class RelayedError(DpnError):
    """An error that another process of the same run tells the user about."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known word, whatever its case, or the empty string."""
    names = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), names, n=1)
    return f" Did you mean {names[close[0]]!r}?" if close else ""
