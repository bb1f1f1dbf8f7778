"""What can be wrong with one row, or with a file of rows."""

from pathlib import Path

from dpn_cli.errors import DataError

MISSING = "missing image file"
UNREAD = "text or images that are not read"
MAX_DETAIL = 300  # characters


class RowError(DataError):
    """A row that cannot be used.

    Attributes:
        reason: Kind of fault in a few words, the same for every row that has it.
        detail: Description of the fault in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = " ".join(detail[:MAX_DETAIL].split()) or reason
        super().__init__(f"{reason}: {self.detail}" if detail else reason)


def unreadable(path: Path, error: OSError | UnicodeDecodeError) -> DataError:
    """Return what is wrong with a file that is to be text."""
    if isinstance(error, OSError):
        return DataError(f"{path} cannot be read: {error.strerror or error}")
    return DataError(f"{path} cannot be read as UTF-8 text: {error}")
