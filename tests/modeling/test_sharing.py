"""Several callers of one model: what one of them sets, no other one sees."""

import asyncio
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import pytest
import torch

from dpn_cli.pyramid.budgets import Budget
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.experts import KEEP
from tests.pyramids import collate, prompt, ragged_batch

GREEDY = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 3}
BUDGETS = (Budget(0.8, 1.0, 0.01), Budget(0.4, 30.0, 0.05))
USES: dict[str, Callable[[Any], Any]] = {
    "a route": lambda model: model.on_route((2, 0, 1)),
    "another route": lambda model: model.on_route((0, 2, 0)),
    "a budget": lambda model: model.at_budget(0.4),
    "the teacher": lambda model: model.teacher(),
}


@pytest.fixture
def model(make_pair: Any) -> Any:
    _, model = make_pair(min_visual_tokens=4, budgets=BUDGETS)
    return model


def ask(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[list[int]], list[Any], list[Any]]:
    """Return the tokens, and what the model says about the prefill."""
    return model.generate(**inputs, **GREEDY).tolist(), model.last_routes, model.last_grids


def routes_of(model: Any) -> list[tuple[int, ...]]:
    with torch.no_grad():
        model(**prompt(1, 3, 5, seed=0))
    return model.last_routes


def test_threads_do_not_see_each_other(model: Any) -> None:
    inputs, barrier = collate(ragged_batch()), Barrier(len(USES))
    alone = {}
    for name, use in USES.items():
        with use(model):
            alone[name] = ask(model, inputs)
    assert len({str(routes) for _, routes, _ in alone.values()}) == len(USES), "they must differ to mean something"

    def work(name: str) -> None:
        barrier.wait()
        for _ in range(2):
            with USES[name](model):
                assert ask(model, inputs) == alone[name], name
            assert model.last_routes == alone[name][1], "known afterwards"

    with ThreadPoolExecutor(len(USES)) as pool:
        list(pool.map(work, USES))


def test_tasks_do_not_see_each_other(model: Any) -> None:
    async def work(route: tuple[int, ...]) -> None:
        with model.on_route(route):
            await asyncio.sleep(0)
            assert routes_of(model) == [route]
            await asyncio.sleep(0)
            assert model.last_routes == [route]
            assert await asyncio.to_thread(routes_of, model) == [route], "a task takes its settings along"

    async def main() -> None:
        await asyncio.gather(*(work(route) for route in ((2, 0, 1), (0, 2, 0), (1, 1, 0))))

    asyncio.run(main())


def test_a_new_thread_starts_with_what_is_set_on_the_model(model: Any) -> None:
    model.set_route((1, 0, 1))
    with model.on_route((2, 0, 1)), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: model.last_routes).result() == []
        assert pool.submit(routes_of, model).result() == [(1, 0, 1)]
        model.set_route((0, 1, 0))
        assert pool.submit(routes_of, model).result() == [(0, 1, 0)]
        assert routes_of(model) == [(2, 0, 1)]
    assert routes_of(model) == [(0, 1, 0)]


def test_settings_nest_and_end_with_an_exception(model: Any) -> None:
    routed = routes_of(model)
    with pytest.raises(ZeroDivisionError), model.on_route((2, 0, 1)) as same:
        assert same is model
        with model.on_route((0, 1, 0)):
            assert routes_of(model) == [(0, 1, 0)]
            with model.on_route(None):
                assert routes_of(model) == routed
            with model.teacher():
                assert routes_of(model) == [(0, 0, 0)]
        with model.at_budget(0.4):
            assert routes_of(model) == [(2, 0, 1)], "a forced route takes precedence over a budget"
        raise ZeroDivisionError
    assert routes_of(model) == routed
    for bad in (model.on_route((0, 0)), model.at_budget(0.1)):
        with pytest.raises(ValueError, match=r"3 sites|budget"), bad:
            pytest.fail("refused at the door")
    assert routes_of(model) == routed


def test_a_budget_for_a_while_leaves_the_models_own(model: Any, tmp_path: Any) -> None:
    model.set_budget(0.8)
    cheap = copy.deepcopy(model)
    cheap.set_budget(0.4)
    with model.at_budget(0.4):
        assert model.text_model.trade_off == 30.0 and model.pyramid.trade_off == 1.0
        assert routes_of(model) == routes_of(cheap)
        model.save_pretrained(tmp_path)
    with model.at_budget(None):
        assert model.text_model.trade_off == 0.0
    assert model.text_model.trade_off == 1.0
    saved = type(model).from_pretrained(tmp_path)
    assert saved.text_model.trade_off == saved.config.pyramid["lambda"] == 1.0


def test_a_model_is_copied_and_pickled_with_its_own_settings_alone(model: Any) -> None:
    model.set_route((1, 0, 1))
    with model.on_route((2, 0, 1)):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
        assert routes_of(model) == [(2, 0, 1)]
        for each in (*copies, copy.deepcopy(model)):
            assert each.last_routes == [] and routes_of(each) == [(1, 0, 1)]
            each.set_route((0, 1, 0))
            with each.on_route((0, 2, 0)):
                assert routes_of(model) == [(2, 0, 1)]


def test_another_method_takes_over_in_its_thread_alone(model: Any) -> None:
    seen: list[int] = []
    elsewhere = PyramidConfig((Site(-1, (KEEP,)), Site(2, (KEEP,))), static_route=(0, 0))

    @contextmanager
    def watched() -> Iterator[None]:
        with model.as_pyramid(elsewhere), model.reduced_by(lambda state, site: seen.append(site) or state):
            yield

    def other() -> list[tuple[int, ...]]:
        assert len(model.text_model.segments) == 4
        return routes_of(model)

    routed = routes_of(model)
    with watched(), ThreadPoolExecutor(1) as pool:
        assert [len(layers) for layers in model.text_model.segments] == [0, 3, 5]
        assert pool.submit(other).result() == routed and not seen
        routes_of(model)
    assert seen == [0, 1]
    assert routes_of(model) == routed
