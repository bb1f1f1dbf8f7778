"""A reporter that remembers how far it was told the work is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dpn_cli.reporter import Reporter


class Heard:
    """Listens to what is counted in bytes.

    Attributes:
        bytes: what was announced of each piece of work, and what was then told of it in all, by its description.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, tuple[int, int]] = {}

    @property
    def reporter(self) -> Reporter:
        """What to pass on."""
        return Reporter(copying=self._copying)

    @contextmanager
    def _copying(self, description: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        told: list[int] = []
        yield told.append
        self.bytes[description] = nbytes, sum(told)
