"""What a report holds: figures that agree with each other, and plain data."""

import json

import pytest
from PIL import Image

from dpn_cli.calibration.reporting.report import Report
from dpn_cli.data.samples import Sample, Turn
from tests.reports import made_up_report


@pytest.fixture(scope="module")
def report() -> Report:
    image = Image.new("RGB", (8, 8))
    return made_up_report([Sample(str(i), (image,), (Turn("What?", "that"),)) for i in range(60)])


def test_per_budget_agrees_with_the_budget_table(report: Report) -> None:
    assert [o.fraction for o in report.per_budget] == [b.fraction for b in report.budgets]
    assert [o.distortion for o in report.per_budget] == [b.distortion for b in report.budgets]
    assert all(sum(o.shares.values()) == pytest.approx(1) for o in report.per_budget)


def test_the_best_fixed_route_is_among_the_fixed_ones_and_no_dearer(report: Report) -> None:
    assert report.best_fixed is not None
    route, best = report.best_fixed
    assert report.fixed[route] == best
    assert best.fraction <= report.routed.fraction
    assert all(
        best.distortion <= other.distortion
        for other in report.fixed.values()
        if other.fraction <= report.routed.fraction
    )


def test_visual_tokens_fall_at_the_sites_only(report: Report) -> None:
    assert report.visual_tokens_full == [576.0] * 32
    falls = [i for i in range(31) if report.visual_tokens[i + 1] < report.visual_tokens[i]]
    assert falls == [7, 15, 23]
    assert report.visual_tokens[0] == 576.0


def test_worst_and_best_are_the_ends_of_one_order(report: Report) -> None:
    worst = [case.measured.distortion for case in report.worst]
    best = [case.measured.distortion for case in report.best]
    assert len(worst) == len(best) == 10
    assert worst == sorted(worst, reverse=True)
    assert best == sorted(best)
    assert max(best) <= min(worst)
    assert not {case.sample.id for case in report.worst} & {case.sample.id for case in report.best}


def test_few_samples_are_shown_once() -> None:
    image = Image.new("RGB", (8, 8))
    few = made_up_report([Sample(str(i), (image,), (Turn("What?", "that"),)) for i in range(13)])
    assert (len(few.worst), len(few.best)) == (10, 3)


def test_json_holds_everything_but_the_images(report: Report) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    assert set(data) == set(vars(report)) - {"cases"} | {"worst", "best", "changed", "losses"}
    assert len(data["changed"]) == data["losses"][-1]["changed"]
    assert data["worst"][0].keys() == {
        "id", "question", "label", "teacher", "student", "distortion", "agreement", "fraction", "route",
    }  # fmt: skip
    assert len(data["fixed"]) == len(report.fixed) > 20
    assert data["versions"].keys() == {"dpn-cli", "python", "torch", "transformers"}
