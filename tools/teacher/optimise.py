"""The optimiser of both training stages: Muon for the matrices of the layers, AdamW for the rest."""

from collections.abc import Iterable

import torch
from torch import nn

WARM_UP = 50
DECAY = 0.25


class Optimiser:
    """Muon and AdamW under one schedule: warm-up, constant, linear decay to zero.

    Args:
        layers: Modules whose matrices Muon updates.
        others: Modules that AdamW updates whole.
        rate: Peak learning rate of both.
        steps: Length of the schedule.

    Source: Jordan et al. 2024, Muon, with the AdamW-matched update size of Liu et al. 2025.
    """

    def __init__(self, layers: Iterable[nn.Module], others: Iterable[nn.Module], rate: float, steps: int) -> None:
        inner = [parameter for module in layers for parameter in module.parameters()]
        matrices = [parameter for parameter in inner if parameter.ndim == 2]
        rest = [parameter for parameter in inner if parameter.ndim != 2]
        rest += [parameter for module in others for parameter in module.parameters()]
        self._rate, self._steps = rate, steps
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.02),
        ]

    def step(self, step: int) -> None:
        """Apply the gradients of one step at its scheduled rate, and clear them."""
        rate = self._rate * min(1.0, (step + 1) / WARM_UP, (self._steps - step) / (DECAY * self._steps))
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        """Return what ``load_state_dict`` needs to go on."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        """Go on from a state that ``state_dict`` returned."""
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)
