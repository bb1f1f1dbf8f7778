"""An evaluation as one page that needs nothing else: what the pyramid lost, then what other methods would have."""

from collections.abc import Mapping, Sequence

from dpn_cli.data.samples import Sample
from dpn_cli.evaluation.evaluate import Evaluation, Result
from dpn_cli.pages.rendering import render_page

CHANGED = 20  # answers that are shown side by side, per budget


def render(evaluation: Evaluation, samples: Sequence[Sample], origin: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        evaluation: Evaluation to show.
        samples: Samples that were asked, in order; the images of some are read once more.
        origin: What was evaluated on what, when and where, for the reader.

    Raises:
        DataError: if an image cannot be read.
    """
    return render_page(
        "dpn_cli.evaluation",
        "report.html.jinja",
        evaluation=evaluation,
        origin=origin,
        scored=evaluation.results[0].figures.accuracy is not None,
        pyramids=[(result, changed(evaluation, result), _has_kinds(result)) for result in evaluation.pyramids],
        samples=samples,
        shown=CHANGED,
    )


def changed(evaluation: Evaluation, result: Result) -> list[int]:
    """Return the numbers of the samples whose answer is not the original's, the largest KL first."""
    pairs = zip(result.per_sample, evaluation.questions, strict=True)
    found = [i for i, (sample, question) in enumerate(pairs) if sample.answer != question.teacher]
    return sorted(found, key=lambda i: -result.per_sample[i].distortion)


def _has_kinds(result: Result) -> bool:
    return len(result.kinds) > 1
