"""Budgets that were asked for, beside what was spent."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpn_cli.data.options import DataOptions
from dpn_cli.evaluation.spending import Spending, unmet
from dpn_cli.pyramid.budgets import BUDGET_STEP, Budget
from dpn_cli.pyramid.config import PyramidConfig

TABLE = (Budget(1.003, 0.0, 0.0), Budget(0.983, 0.001, 0.0), Budget(0.35, 0.5, 0.1), Budget(0.33, 20.0, 0.9))


@given(st.floats(0.33, 0.999))
def test_lambda_stands_for_the_budget_that_it_was_solved_for(budget: float) -> None:
    trade_off = PyramidConfig((), budgets=TABLE).trade_off_for(budget)
    found = PyramidConfig((), budgets=TABLE, trade_off=trade_off).budget
    is_between = 0.35 <= budget <= 0.983 - BUDGET_STEP  # no λ spends so much
    assert found == pytest.approx(0.35 if is_between else budget, abs=1e-5)


def test_no_limit_and_no_table_stand_for_no_budget() -> None:
    assert PyramidConfig((), budgets=TABLE, trade_off=0.0).budget is None
    assert PyramidConfig((), trade_off=0.3).budget is None
    assert PyramidConfig((), budgets=TABLE, trade_off=50.0).budget == 0.33


@pytest.mark.parametrize(
    ("asked", "spent", "samples", "is_met"),
    [
        (0.5, 0.51, 9, True), (0.5, 0.63, 9, False), (0.5, 0.46, 9, True), (0.5, 0.4, 9, False),
        (0.5, 0.63, 1, False), (0.5, 0.34, 1, True), (1.0, 1.04, 9, True),
    ],
)  # fmt: skip
def test_a_budget_is_met_or_not(asked: float, spent: float, samples: int, is_met: bool) -> None:
    spending = Spending(asked, spent, samples)
    assert spending.is_met == is_met
    lines = list(unmet([spending], PyramidConfig(()), Path("a model"), DataOptions("my data.json", Path("pictures"))))
    assert bool(lines) != is_met
    command = "dpn calibrate --model 'a model' --data 'my data.json' --image-root pictures --budgets-only"
    assert is_met or lines[-1].endswith(command)


def test_spending_less_is_no_fault_where_more_would_buy_nothing() -> None:
    gap = PyramidConfig((), budgets=(Budget(1.0, 0.0, 0.0), Budget(0.34, 0.4, 0.01), Budget(0.2, 5.0, 0.5)))
    assert not list(unmet([Spending(0.5, 0.33, 9)], gap, Path("out"), None))
    assert list(unmet([Spending(0.5, 0.2, 9)], gap, Path("out"), None))


def test_the_data_of_the_budgets_are_named() -> None:
    record = {"data": "theirs", "budgets_solved_on": {"data": "ours"}}
    said = list(unmet([Spending(0.5, 0.7, 4)], PyramidConfig((), calibration=record), Path("out"), None))
    assert "λ was solved on ours" in said[-1] and "--data DATA" in said[-1]
