"""Switching an adapter (peft) off for one caller of a model: peft's own switch is in the layers, which all share."""

from typing import Any

from torch import nn

from dpn_cli.modeling.call import current_call


def adapted_layers(model: nn.Module) -> list[Any]:
    """Return peft's layers, each around an original one."""
    return [layer for layer in model.modules() if hasattr(layer, "base_layer")]


class AdapterSwitch:
    """Stands in for the forward of an adapted layer: while the adapter is off, the original layer runs."""

    def __init__(self, layer: Any, text_model: nn.Module) -> None:
        self.layer, self.text_model = layer, text_model
        self.adapted = layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with its adapter, or without where the `Call` says so."""
        if current_call(self.text_model).adapts:
            return self.adapted(*args, **kwargs)
        if self.layer.merged:
            self.layer.unmerge()  # as peft does
        return self.layer.base_layer(*args, **kwargs)


def make_switchable(model: nn.Module, text_model: Any) -> None:
    """Let all adapted layers of a model heed the `Call` of its text model."""
    for layer in adapted_layers(model):
        if not isinstance(layer.forward, AdapterSwitch):
            layer.forward = AdapterSwitch(layer, text_model)
