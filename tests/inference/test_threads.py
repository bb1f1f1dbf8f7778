"""Small matrices are computed on one thread; what was set before holds afterwards."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dpn_cli.calibration import fitting
from dpn_cli.calibration.budgets import budget_table
from dpn_cli.calibration.policy import Policy
from dpn_cli.inference.threads import one_thread, threads_for
from tests.calibration.test_policy import make_routers, make_table


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_fitting_and_budgets_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Policy.chooser, []

    def chooser(self: Policy, *args: Any) -> Any:
        seen.append(torch.get_num_threads())
        return real(self, *args)

    monkeypatch.setattr(Policy, "chooser", chooser)
    table, routers = make_table(40), make_routers()
    fitting.fit_routers(routers, table, table, epochs=5, learning_rate=1e-2, seed=0)
    assert seen and set(seen) == {1} and torch.get_num_threads() == 2
    seen.clear()
    budget_table(routers, table)
    assert seen and set(seen) == {1} and torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("width", "count"), [(128, 1), (4096, 2)])
def test_wide_routers_take_all_threads(width: int, count: int) -> None:
    with threads_for(width):
        assert torch.get_num_threads() == count
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_failure_leaves_the_threads_as_they_were() -> None:
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = torch.get_num_threads() // 0
    assert torch.get_num_threads() == 2
