"""Where the rows of a text are: three numbers each, since a small file may hold millions of rows."""

from array import array


class Spans:
    """The places of rows: the number of each, and where it starts and ends."""

    def __init__(self) -> None:
        self._values = array("q")

    def append(self, number: int, start: int, end: int) -> None:
        """Add a row."""
        self._values.extend((number, start, end))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._values) // 3

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        """Return the number, the start and the end of a row."""
        number, start, end = self._values[3 * index : 3 * index + 3]
        return number, start, end
