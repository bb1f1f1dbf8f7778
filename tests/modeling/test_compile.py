"""`torch.compile` takes a pyramid apart where routes decide, and gives the same logits and answers."""

from typing import Any

import pytest
import torch

from dpn_cli.modeling import packing
from tests.pyramids import collate, prompt


@pytest.mark.slow
def test_a_compiled_model_routes_and_answers_as_before(make_pair: Any) -> None:
    _, model = make_pair()
    sample = prompt(1, 3, 5, seed=0)
    with torch.no_grad():
        expected, routes = model(**sample).logits, model.last_routes
        tokens = model.generate(**sample, max_new_tokens=3, do_sample=False)
        model.forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(model(**sample).logits, expected)
        assert model.last_routes == routes and any(routes[0])
        assert torch.equal(model.generate(**sample, max_new_tokens=3, do_sample=False), tokens)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [True, False])
def test_layers_that_are_compiled_are_not_compiled_again_for_every_batch(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    _, model = make_pair()
    monkeypatch.setitem(packing.MOVE_COST, "cpu", 0)
    model.set_route([(1, 1, 0), (0, 0, 0)])
    layers = model.text_model.layers
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for i, layer in enumerate(layers):
        if in_place:
            layer.compile(backend=backend)
        else:
            layers[i] = torch.compile(layer, backend=backend)
    counts = []
    for words in range(3, 8):
        with torch.no_grad():
            model(**collate([prompt(1, words, 5, seed=0), prompt(1, 2, 2, seed=1)]))
        counts.append(graphs)
    assert counts[-1] == counts[-2] == counts[-3]
