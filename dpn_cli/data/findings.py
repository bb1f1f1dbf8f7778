"""What a scan of the data found, as counts and as sentences."""

from collections.abc import Sequence
from dataclasses import dataclass

from dpn_cli.data.samples import Sample

ROWS_SHOWN = 5  # per reason


@dataclass(frozen=True)
class Fault:
    """A bad row: its number and what is wrong with it."""

    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Attributes:
        format: what the data was taken for.
        available: rows in the data.
        rows: rows that were drawn and read, the bad ones included.
        with_image: good rows with at least one image.
        text_only: good rows without an image.
        several_images: good rows with more than one image.
        multi_turn: good rows with more than one question.
        unanswered: good rows with a question that has no answer.
        faults: the bad rows.
    """

    format: str
    available: int
    rows: int
    with_image: int
    text_only: int
    several_images: int
    multi_turn: int
    unanswered: int
    faults: tuple[Fault, ...]

    @classmethod
    def of(cls, form: str, available: int, samples: Sequence[Sample], faults: Sequence[Fault]) -> "Scan":
        """Count.

        Args:
            form: what the data was taken for.
            available: number of rows in the data.
            samples: the good rows.
            faults: the bad rows, in any order.
        """
        return cls(
            format=form,
            available=available,
            rows=len(samples) + len(faults),
            with_image=sum(bool(s.images) for s in samples),
            text_only=sum(not s.images for s in samples),
            several_images=sum(len(s.images) > 1 for s in samples),
            multi_turn=sum(len(s.turns) > 1 for s in samples),
            unanswered=sum(s.turns[-1].answer is None for s in samples),
            faults=tuple(sorted(faults, key=lambda fault: fault.row)),
        )

    @property
    def bad_fraction(self) -> float:
        """The share of bad rows among those read."""
        return len(self.faults) / max(1, self.rows)

    def by_reason(self) -> dict[str, list[Fault]]:
        """Return the bad rows of every reason, the most frequent reason first."""
        groups: dict[str, list[Fault]] = {}
        for fault in self.faults:
            groups.setdefault(fault.reason, []).append(fault)
        return dict(sorted(groups.items(), key=lambda group: -len(group[1])))

    def reasons(self) -> list[str]:
        """Return one clause per reason, with the first rows that have it."""
        clauses = []
        for reason, faults in self.by_reason().items():
            numbers = ", ".join(str(fault.row) for fault in faults[:ROWS_SHOWN])
            more = f" and {len(faults) - ROWS_SHOWN} more" if len(faults) > ROWS_SHOWN else ""
            rows = "row" if len(faults) == 1 else "rows"
            detail = "" if faults[0].detail == reason else f" ({faults[0].detail})"
            clauses.append(f"{rows} {numbers}{more}: {reason}{detail}")
        return clauses

    def lines(self) -> list[str]:
        """Return the findings as lines to print."""
        counts = [f"{self.with_image} with an image"]
        counts += [f"{self.several_images} with several images"] if self.several_images else []
        counts += [f"{self.text_only} text-only"] if self.text_only else []
        counts += [f"{self.multi_turn} with several turns"] if self.multi_turn else []
        counts += [f"{self.unanswered} to be answered by the teacher"] if self.unanswered else []
        bad = [f"bad rows: {len(self.faults)} ({self.bad_fraction:.1%})"] if self.faults else []
        return [
            f"Data: {self.format}; {self.rows} of {self.available} rows read",
            f"  {', '.join(counts)}",
            *(f"  {line}" for line in bad),
            *(f"    {clause}" for clause in self.reasons()),
        ]
