"""A terminal in memory: what a command's output looks like on a screen of a given size, with all that scrolled away."""

import re
from collections.abc import Callable

from rich.cells import cell_len

_TOKENS = re.compile(r"\x1b\[([?\d;]*)([@-~])|\x1b\][^\x07]*\x07|[\r\n\b\x07]|[^\x1b\r\n\b\x07]", re.DOTALL)
_STYLES = "mhl"  # finals of sequences that change colours or modes, not text


class Screen:
    """Rows of text, the last of which are the screen.

    Attributes:
        cut: Numbers of the rows that end within a word, because the line was too long.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.cut: set[int] = set()
        self._cells: list[list[str]] = [[]]
        self._row = self._column = 0

    @property
    def rows(self) -> list[str]:
        """All rows, from the first one written, without blanks at their ends."""
        return ["".join(cells).rstrip() for cells in self._cells]

    def write(self, text: str) -> str:
        """Write text; return what is left of it, the beginning of an unfinished escape sequence.

        Raises:
            ValueError: for a sequence that is unknown.
        """
        position = 0
        while position < len(text):
            token = _TOKENS.match(text, position)
            if token is None:
                break
            if token[2]:
                self._obey(token[2], token[1])
            elif token[0] in _CONTROLS:
                _CONTROLS[token[0]](self)
            elif not token[0].startswith("\x1b"):
                self._put(token[0])
            position = token.end()
        return text[position:]

    def _put(self, character: str) -> None:
        width = cell_len(character)
        cells = self._cells[self._row]
        if self._column + width > self.width:
            if character.strip() and cells[-1].strip():
                self.cut.add(self._row)
            self._line_feed()
            self._column, cells = 0, self._cells[self._row]
        cells += [" "] * (self._column + width - len(cells))
        cells[self._column : self._column + width] = [character, *[""] * (width - 1)]
        self._column += width

    def _line_feed(self) -> None:
        self._row += 1
        if self._row == len(self._cells):
            self._cells.append([])

    def _return(self) -> None:
        self._column = 0

    def _back(self) -> None:
        self._column = max(0, self._column - 1)

    def _obey(self, final: str, argument: str) -> None:
        """Obey a control sequence."""
        number = int(argument) if argument.isdecimal() else 0
        if final == "A":
            self._row = max(self._row - max(1, number), len(self._cells) - self.height, 0)
        elif final == "K":
            cells = self._cells[self._row]
            cells[:] = [] if number == 2 else cells[: self._column]
            self.cut.discard(self._row)
        elif final not in _STYLES:
            raise ValueError(f"unknown control sequence {argument}{final}")


_CONTROLS: dict[str, Callable[[Screen], None]] = {
    "\r": Screen._return,
    "\n": Screen._line_feed,
    "\b": Screen._back,
    "\x07": lambda screen: None,
}
