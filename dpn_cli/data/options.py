"""What a user says about data, apart from how many samples to read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OnBadRow = Literal["fail", "skip"]
MAX_BAD = 0.05


@dataclass(frozen=True)
class DataOptions:
    """Which data to read, and how.

    Attributes:
        name: the data, as `FORMATS` describes them.
        image_root: the folder that relative image paths start in; by default that of the file that names them.
        ignored: fields of the rows that are left unread, as if they were not there.
        columns: Roles of fields, each with the field that has it: (("image", "picture"), ("question", "prompt")).
        allow_urls: Whether to fetch images of the web.
        stream: Whether to read no more of a table or of the hub than the samples that are drawn.
        on_bad_row: `fail`, or `skip` up to `max_bad`.
        max_bad: the largest share of the rows read that may be bad.
        kind_field: the field that names a sample's group; None for `kind`, where there is one.
    """

    name: str
    image_root: Path | None = None
    ignored: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    allow_urls: bool = False
    stream: bool = False
    on_bad_row: OnBadRow = "fail"
    max_bad: float = MAX_BAD
    kind_field: str | None = None

    def arguments(self) -> list[str]:
        """Return the command line that reads the same rows in the same way."""
        return [
            "--data", self.name,
            *(["--image-root", str(self.image_root)] if self.image_root else []),
            *(["--columns", ",".join(map("=".join, self.columns))] if self.columns else []),
            *(["--ignore-fields", ",".join(self.ignored)] if self.ignored else []),
            *(["--allow-urls"] if self.allow_urls else []),
            *(["--stream"] if self.stream else []),
        ]  # fmt: skip
