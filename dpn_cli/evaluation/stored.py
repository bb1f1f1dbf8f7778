"""An evaluation's results beside their checkpoint: another evaluation on the same data asks only whom it has to."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.earlier import keep_earlier
from dpn_cli.checkpoint.headers import read_json
from dpn_cli.checkpoint.links import EVALUATION_FOLDER
from dpn_cli.checkpoint.workplace import workplace
from dpn_cli.checkpoint.writer import replace_file, write_json
from dpn_cli.data.samples import Sample
from dpn_cli.errors import CheckpointError, DpnError
from dpn_cli.evaluation.evaluate import Evaluation
from dpn_cli.evaluation.judging import Known
from dpn_cli.evaluation.page import render

REPORT_FILE = Path(EVALUATION_FOLDER, "report.json")
PAGE_FILE = REPORT_FILE.with_suffix(".html")
_KNOWN, _DEPENDS_ON = "known", "depends_on"


def read_known(folder: Path, depends_on: dict[str, Any]) -> Known:
    """Return what an earlier evaluation has found that depended on the same; nothing where there is none."""
    with suppress(CheckpointError, OSError):
        found = read_json(folder / REPORT_FILE)
        if _is_same(found, depends_on) and isinstance(found.get(_KNOWN), dict):
            return dict(found[_KNOWN])
    return {}


def write_report(
    folder: Path,
    about: dict[str, str],
    depends_on: dict[str, Any],
    known: Known,
    evaluation: Evaluation,
    samples: Sequence[Sample],
) -> Path | None:
    """Write an evaluation, as data with all that is known by now, and as a page.

    What is there of other samples or settings is not added to, so it is kept.

    Args:
        folder: Folder of the checkpoint.
        about: What was evaluated on what, for the reader.
        depends_on: Plain data that changes with the results.
        known: What the evaluator knows.
        evaluation: Evaluation to write.
        samples: Samples that were asked, in order.

    Returns:
        The folder with the evaluation that was replaced; None if there was none, or if it was added to.

    Raises:
        DataError: if an image cannot be read any more.
        DpnError: if the files cannot be written, or there is a report that is damaged or not dpn's.
    """
    path = folder / REPORT_FILE
    earlier = _read_earlier(path) if path.exists() else None
    page = render(evaluation, samples, about)
    report = about | evaluation.to_dict() | {"questions": [asdict(question) for question in evaluation.questions]}
    report |= {_DEPENDS_ON: depends_on, _KNOWN: known}
    is_other = earlier is not None and not _is_same(earlier, depends_on)
    with workplace(path, "{holder} is writing it", "evaluate a copy to keep its results") as work:
        kept = keep_earlier((path, folder / PAGE_FILE), path.parent, work) if is_other else None
        replace_file(path, lambda stage: write_json(stage, report), work)
        replace_file(folder / PAGE_FILE, lambda stage: stage.write_text(page, encoding="utf-8"), work)
    return kept


def _read_earlier(path: Path) -> dict[str, Any]:
    """Return the report that is about to be replaced."""
    try:
        earlier = read_json(path)
    except CheckpointError:
        raise DpnError("what is there is damaged: delete it, and run the command again") from None
    if not earlier.keys() >= {_KNOWN, _DEPENDS_ON}:
        raise DpnError("it is not dpn's")
    return earlier


def _is_same(report: dict[str, Any], depends_on: dict[str, Any]) -> bool:
    """Tell whether the results of a report depend on the same."""
    return bool(report.get(_DEPENDS_ON) == json.loads(json.dumps(depends_on)))
