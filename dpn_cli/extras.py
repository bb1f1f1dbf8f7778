"""What a command does besides its work: where it fails, the results count, and are shown."""

from collections.abc import Iterator
from contextlib import contextmanager

from dpn_cli.errors import DpnError


@contextmanager
def extra(failure: str) -> Iterator[None]:
    """Name what comes after the work where it fails.

    Args:
        failure: Clause that says what did not happen, for the middle of a sentence.

    Raises:
        DpnError: if the block fails; exit code 1, since not all that was asked for is there.
    """
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise DpnError(f"the results are complete, but {failure}: {reason or error}") from error
