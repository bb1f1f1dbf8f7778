"""Tables by their columns, and what the words at the head of a column mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dpn_cli import console

BUDGETS_SHOWN = 10
Row = TypeVar("Row")
MEANINGS = {
    "FLOPs": "share of the prefill FLOPs of the original language model",
    "KL": "distance of the answer's token probabilities from the {reference}'s, in nats",
    "top-1": "share of the answer tokens for which the most likely token is the {reference}'s",
    "λ": "what the routers are charged for FLOPs, solved for the budget",
    "most frequent route": "in brackets the share of the samples that take it",
    "over dpn": "95% interval of the difference from dpn's KL",
    "same answer": "word for word the original's",
    "original": "right answers of the original, by the labels",
    "dpn": "right answers of the pyramid",
    "tokens": "visual tokens per layer, the mean",
    "accuracy": "right answers, by the labels",
    "change": "95% interval of the accuracy's difference from the original's, in points",
    "McNemar p": "how likely such a change is by chance",
    "first token": "from the encoded prompt to the first token, the vision tower included",
    "prefill": "the language model alone",
    "speedup": "of the prefill, paired by round, with its 95% interval",
    "per token": "of the answer, after the first",
    "peak": "the most memory in use",
    "same token": "samples whose most likely first token is the original's",
}
"""What a word at the head of a column means, for who sees it for the first time; see `meaning`."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        head: Name of the column, with its unit.
        cell: returns what it shows of an item.
        wide: whether only `--wide` shows it.
        text: whether it is aligned to the left and may be wrapped.
        means: the key in `MEANINGS` of what the legend says about it; empty for nothing.
    """

    head: str
    cell: Callable[[Any], object]
    wide: bool = False
    text: bool = False
    means: str = ""


def meaning(word: str, reference: str = "original") -> str:
    """Return a word with what it means, where answers are compared with those of the reference."""
    return f"{word}: {MEANINGS[word].format(reference=reference)}"


def show(
    title: str,
    columns: Sequence[Column],
    items: Sequence[Any],
    wide: bool,
    reference: str = "original",
    more: str = "",
) -> None:
    """Print a table of items, one a row, and what its columns mean.

    Args:
        title: Title of the table.
        columns: All columns.
        items: What the rows show.
        wide: Whether all columns are shown.
        reference: Name of the model that answers are compared with.
        more: Further sentences of the legend.
    """
    shown = [column for column in columns if wide or not column.wide]
    legend = "; ".join(meaning(column.means, reference) for column in shown if column.means)
    console.table(
        title,
        [column.head for column in shown],
        [[column.cell(item) for column in shown] for item in items],
        texts=[column.head for column in shown if column.text],
        legend=" ".join(filter(None, [f"{legend}." if legend else "", more])),
    )


def some_budgets(rows: Sequence[Row], wide: bool) -> list[Row]:
    """Return all rows of a budget table if it is wide, else about `BUDGETS_SHOWN` of them, the last one included."""
    return [*rows[: -1 : 1 if wide else -(-len(rows) // BUDGETS_SHOWN)], rows[-1]]
