"""The page of a report: whole, self-contained, and safe to open whatever the data holds."""

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from dpn_cli.calibration.reporting.html import CHANGED, render
from dpn_cli.calibration.reporting.losses import losses
from dpn_cli.calibration.reporting.report import Report
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.pages.rendering import LONGEST_TEXT
from tests.reports import made_up_report

EVIL = "<script>alert('x')</script> & \"quotes\" </title>"
VOID = {"meta", "img", "link", "wbr"}


class Page(HTMLParser):
    """Collects elements and text; fails on elements that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.elements)


def samples(count: int = 40, question: str = "What is it?", answer: str | None = "a cat") -> Sequence[Sample]:
    image = Image.new("RGB", (400, 200), "teal")
    return [Sample(f"row-{i}", (image,), (Turn(question, answer),)) for i in range(count)]


@pytest.fixture(scope="module")
def report() -> Report:
    return made_up_report(samples())


def test_the_page_shows_every_figure_and_case(report: Report) -> None:
    page = Page(render(report))
    text = " ".join(" ".join(page.text).split())
    assert page.count("svg") == 4
    changed, kept = report.changed[:CHANGED], [case for case in (*report.worst, *report.best) if not case.has_changed]
    assert page.count("article") == page.count("img") == len(changed) + len(kept)
    assert f"{len(report.changed)} of {len(report.cases)} answers changed" in text
    for value in report.origin.values():
        assert value in text
    assert page.count("tr", **{"class": "chosen"}) == 1
    for figure in (report.routed.fraction, report.routed.agreement, *report.agreement_interval):
        assert f"{figure:.1%}" in text
    assert report.best_fixed is not None
    assert report.experts(report.best_fixed[0]) in "".join(page.text)
    for key in (*report.settings, *report.versions):
        assert key in text
    fixed = [attrs for tag, attrs in page.elements if tag == "circle" and attrs["class"] == "dot mark-1"]
    assert len(fixed) == 2 * len(report.fixed)


def test_the_page_needs_nothing_else_and_runs_nothing(report: Report) -> None:
    text = render(report)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not re.search(r"https?://|url\(|@import", text)
    assert all(
        (attrs["src"] or "").startswith("data:image/jpeg;base64,") for tag, attrs in page.elements if tag == "img"
    )
    assert "default-src 'none'" in text


def test_whatever_the_data_holds_is_shown_as_text() -> None:
    report = made_up_report(samples(question=EVIL, answer=EVIL))
    report = replace(report, settings=report.settings | {"data": EVIL})
    report = replace(report, cases=[replace(case, teacher=EVIL, student=f"not {EVIL}") for case in report.cases])
    page = Page(render(report))
    assert page.count("script") == 0
    assert page.text.count(EVIL) == 3 * CHANGED + 1 and page.text.count(f"not {EVIL}") == CHANGED


def test_a_lone_surrogate_does_not_stop_the_page(report: Report) -> None:
    report = replace(report, settings=report.settings | {"data": "caf\udce9"})
    assert "caf\\udce9" in render(report).encode("utf-8").decode()


def test_long_texts_are_shortened() -> None:
    text = render(made_up_report(samples(answer="x" * 5000)))
    assert "x" * LONGEST_TEXT + "…" in text
    assert "x" * (LONGEST_TEXT + 1) not in text


def test_without_labels_the_originals_answer_stands_alone() -> None:
    page = Page(render(made_up_report(samples(answer=None))))
    assert "label" not in page.text
    assert page.text.count("original") == page.count("article") + 1
    assert "Right answers" not in page.text


def test_a_report_without_an_affordable_fixed_route_or_cases(report: Report) -> None:
    page = Page(render(replace(report, best_fixed=None, cases=[])))
    assert "No fixed route is as cheap" in " ".join(page.text)
    assert page.count("article") == 0


def test_losses_are_told_by_kind_with_the_worst_kind_first() -> None:
    given = [replace(sample, kind=f"kind {i % 3}") for i, sample in enumerate(samples(answer="Red."))]
    report = made_up_report(given)
    page = Page(render(report))
    rows = [text for text in page.text if re.fullmatch(r"kind \d|all", text)][: len(losses(report.cases))]
    *kinds, total = losses(report.cases)
    assert rows == [*(loss.kind for loss in kinds), "all"] and len(kinds) == 3
    assert [loss.changed / loss.count for loss in kinds] == sorted((x.changed / x.count for x in kinds), reverse=True)
    assert sum(loss.changed for loss in kinds) == total.changed == len(report.changed) > 0
    assert (total.original, total.calibrated) == (1.0, 1 - total.changed / total.count), "up to case and punctuation"


def test_where_no_answer_changed_the_page_says_so(report: Report) -> None:
    same = [replace(case, student=case.teacher) for case in report.cases]
    text = " ".join(" ".join(Page(render(replace(report, cases=same))).text).split())
    assert f"None of {len(same)} answers changed" in text and "Answers that changed" not in text


def test_equal_reports_give_equal_pages(report: Report) -> None:
    assert render(report) == render(made_up_report(samples()))
