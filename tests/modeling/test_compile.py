"""`torch.compile` takes a pyramid apart where routes decide, and gives the same logits and answers."""

from typing import Any

import pytest
import torch

from tests.pyramids import prompt


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
