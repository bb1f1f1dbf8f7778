"""What can be wrong with one row."""

MISSING = "missing image file"
MAX_DETAIL = 300  # characters


class RowError(Exception):
    """A row that cannot be used.

    Attributes:
        reason: a few words, the same for every row with this fault.
        detail: what exactly is wrong with this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail[:MAX_DETAIL] or reason
