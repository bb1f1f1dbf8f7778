"""Is an answer right? Pure functions of an answer and the label, each from 0 to 1."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}  # fmt: skip
ANLS_THRESHOLD = 0.5

_CHOICE_FIRST = re.compile(r"^\s*\(?([A-Za-z])(?:\s*$|[).:,])")
_CHOICE_SAID = re.compile(r"(?i:answer|option|choice)(?: is)?:?\s*\(?(?!I['’ ]\w)([A-Z])\b")
_CHOICE_IN_BRACKETS = re.compile(r"\(([A-Za-z])\)")


def normalise(text: str) -> str:
    """Return what VQA compares: lower case, without punctuation and articles, numbers up to ten as digits.

    Source: the evaluation of VQA v2, https://visualqa.org/evaluation.html. Ours: a contraction equals itself without
    its apostrophe, where VQA has a list of them; signs of numbers and the marks of all scripts stay; and a text of
    articles or punctuation alone stays what it is (`A` and `?` are answers).
    """
    text = whole = unicodedata.normalize("NFC", text.lower())
    text = re.sub(r"['’`]", "", text)
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = "".join(c if c in ".-" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    text = re.sub(r"-(?!\d)|(?<=[^ ])-", " ", text)  # but the sign of a number
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join([word for word in words if word not in ARTICLES] or words) or whole.strip()


def exact_match(answer: str, label: str) -> float:
    """Return 1 for the same answer up to `normalise`, else 0."""
    return float(normalise(answer) == normalise(label))


def multiple_choice(answer: str, label: str) -> float:
    """Return 1 if the answer names the letter that the label names: `B`, `(b)`, `B. a cat`, `The answer is B`."""
    chosen = chosen_letter(answer)
    return float(chosen is not None and chosen == chosen_letter(label))


def chosen_letter(text: str) -> str | None:
    """Return the letter of the option that a text names, in upper case."""
    text = text.replace("*", "")  # of Markdown
    for pattern in (_CHOICE_FIRST, _CHOICE_SAID, _CHOICE_IN_BRACKETS):
        if found := pattern.search(text):
            return found[1].upper()
    return None


def anls(answer: str, label: str) -> float:
    """Return the normalised Levenshtein similarity, 0 where it is below one half.

    Source: Biten et al. 2019, https://arxiv.org/abs/1905.13648, section 5, for one label.
    """
    a, b = " ".join(answer.lower().split()), " ".join(label.lower().split())
    distance = edit_distance(a, b) / max(len(a), len(b), 1)
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Return how many insertions, deletions and substitutions turn one sequence into another (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@dataclass(frozen=True)
class Metric:
    """A way to score answers.

    Attributes:
        description: Description for help texts.
        score: returns an answer's score by its label, from 0 to 1.
        fits: tells whether a label is one that it can score by.
    """

    description: str
    score: Callable[[str, str], float]
    fits: Callable[[str], bool] = lambda label: True


METRICS = {
    "exact": Metric("exact match, normalised as in VQA", exact_match),
    "choice": Metric("letter of the option", multiple_choice, lambda label: chosen_letter(label) is not None),
    "anls": Metric("edit distance", anls),
}
