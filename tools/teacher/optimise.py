"""The optimiser: Muon for the matrices of the layers, AdamW for the rest, under a schedule that follows the clock."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

WARM_UP = 100
DECAY = 0.5
MOMENTUM = 0.95
WEIGHT_DECAY = 0.02


class Muon:
    """Muon, all matrices of one shape in one go: on a GPU the number of kernels is what costs.

    Args:
        matrices: The parameters, each of two dimensions.

    Source: Jordan et al. 2024, Muon, with the AdamW-matched update size of Liu et al. 2025.
    """

    def __init__(self, matrices: Iterable[nn.Parameter]) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        self._groups = [
            (group, torch.zeros(len(group), *shape, device=group[0].device)) for shape, group in shapes.items()
        ]

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """Apply the gradients at a rate and clear them."""
        for group, momentum in self._groups:
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            momentum.mul_(MOMENTUM).add_(gradient)
            update = _orthogonal(gradient + MOMENTUM * momentum).float()
            update *= -0.2 * max(momentum.shape[1:]) ** 0.5 * rate
            torch._foreach_mul_(group, 1 - rate * WEIGHT_DECAY)
            torch._foreach_add_(group, update.unbind())
            for parameter in group:
                parameter.grad = None


def _orthogonal(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix by about one: five Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Optimiser:
    """Both optimisers under one schedule: warm-up by steps, constant, then linear decay to zero by the clock.

    Args:
        layers: Modules whose matrices Muon updates.
        others: Modules that AdamW updates whole.
        rate: Peak learning rate of both.
    """

    def __init__(self, layers: Iterable[nn.Module], others: Iterable[nn.Module], rate: float) -> None:
        inner = [parameter for module in layers for parameter in module.parameters()]
        rest = [parameter for parameter in inner if parameter.ndim != 2]
        rest += [parameter for module in others for parameter in module.parameters()]
        self._peak, self._step = rate, 0
        self._rate = torch.tensor(0.0, device=rest[0].device)
        self._muon = Muon(parameter for parameter in inner if parameter.ndim == 2)
        gpu = rest[0].is_cuda
        self._adam = torch.optim.AdamW(
            rest, lr=self._rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=gpu, capturable=gpu
        )

    def schedule(self, done: float) -> None:
        """Set the rate of the next step; ``done`` is the fraction of the time that has gone."""
        self._step += 1
        self._rate.fill_(self._peak * min(1.0, self._step / WARM_UP, max(0.0, 1 - done) / DECAY))

    def step(self) -> None:
        """Apply the gradients and clear them."""
        self._muon.step(self._rate)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
