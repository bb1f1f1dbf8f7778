"""The reports in a real browser: nothing is cut off on a phone, nothing is fetched, and nothing is complained of."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpn_cli.calibration.reporting.html import render
from dpn_cli.evaluation import page as evaluation_page
from tests.browser import Browser, chromium
from tests.calibration.reporting.test_html import samples
from tests.commands.test_tables import made_up_evaluation
from tests.reports import made_up_report

pytestmark = pytest.mark.slow  # a browser takes seconds to start
OVERFLOWING = """
const width = document.documentElement.clientWidth;
const scrolls = element => element.closest(".wide");
return [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e))
    .map(e => e.tagName + "." + e.className.toString() + ": " + e.textContent.slice(0, 60));
"""
WITHOUT_NAME = """return [...document.querySelectorAll("img, svg")]
    .filter(e => !(e.getAttribute("alt") || e.getAttribute("aria-label"))).length"""


@pytest.fixture(scope="module", params=["calibration", "evaluation"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = samples(question="What does the sign above the door of the shop say?")
    origin = {"checkpoint": "a/folder/with/a/long/name/" * 4, "data": "data.json"}
    pages = {
        "calibration": lambda: render(made_up_report(asked)),
        "evaluation": lambda: evaluation_page.render(made_up_evaluation(), asked, origin),
    }
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(pages[request.param]())
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_fits_any_screen_and_asks_for_nothing(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, 844, dark)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(OVERFLOWING) == []
    assert browser.run(WITHOUT_NAME) == 0
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith(("file:", "data:", "chrome:"))] == []
