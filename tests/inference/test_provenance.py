"""The head of a report."""

from typing import Any

from dpn_cli.inference.provenance import provenance


def test_what_is_not_known_of_a_model_is_left_out(make_pair: Any) -> None:
    _, model = make_pair()
    assert not hasattr(model.config, "base_model"), "as in folders that were converted elsewhere"
    assert list(provenance(model, {"recipe": None, "data": "x"})) == ["data", "date", "device", "versions"]
    model.config.base_model = "owner/name"
    assert provenance(model, {})["model"] == "owner/name"
