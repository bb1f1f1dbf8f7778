import multiprocessing
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import threads


def test_every_step_is_compared_while_others_keep_the_cores_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[int] = []

    def alone(samples: int) -> dict[str, float]:
        beside.append(sum(each.is_alive() for each in multiprocessing.active_children()))
        return {"fitting routers": 2.0 * len(beside), "all": 10.0 + len(beside)}

    monkeypatch.setattr(threads, "alone", alone)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: {0, 1})
    output = CliRunner().invoke(threads.main, catch_exceptions=False).output
    rows: list[Any] = [line.split()[-3:] for line in output.splitlines() if line.strip().startswith(("fitting", "all"))]
    assert rows == [["2.0", "4.0", "2.00"], ["11.0", "12.0", "1.09"]]
    assert beside == [0, 2] and not multiprocessing.active_children()
