"""Training a few parameters for a number of steps: the loop that healing and the paper's objective share.

Nothing is drawn from a random state that runs along: what a step sees follows from the seed and its number, so that
a run that was killed goes on exactly as it would have gone. Where held-out samples judge, the parameters that did best
on them are kept, and the untrained ones where that is no clear gain.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpn_cli.calibration.passes import training_mode
from dpn_cli.checkpoint.writer import replace_file
from dpn_cli.errors import DpnError
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.processes import ALONE, Processes
from dpn_cli.pyramid.calibration_recipe import TrainingRecipe

STATE_FILE = "training.pt"  # in the folder of the calibration's state
WARM_UP = 0.05  # of the steps
MAX_GRAD_NORM = 1.0
LEAST_GAIN = 0.1  # of the held-out loss: less is noise, or gained where routers do not send samples
WEIGHT_DECAY = 0.0


@dataclass(frozen=True)
class TrainingReport:
    """What training did.

    Attributes:
        trained: parameters that were trained.
        loss: Loss, per step.
        held_out: Loss on held-out samples by the number of steps done; empty if none judge.
    """

    trained: int
    loss: list[float]
    held_out: dict[int, float] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """The number of steps after which the parameters were kept."""
        return best_look(self.held_out) if self.held_out else len(self.loss)

    def summary(self) -> dict[str, Any]:
        """Return plain data: the loss is the mean of the first and of the last tenth of the steps."""
        tenth = max(1, len(self.loss) // 10)
        looks = self.held_out
        judged = {"held_out_at_first": looks[0], "held_out_at_kept": looks[self.kept]} if looks else {}
        return {
            "trained_parameters": self.trained,
            "steps": len(self.loss),
            "loss_at_first": sum(self.loss[:tenth]) / tenth,
            "loss_at_last": sum(self.loss[-tenth:]) / tenth,
            "kept_after": self.kept,
            **judged,
        }


def best_look(held_out: Mapping[int, float]) -> int:
    """Return the step with the lowest held-out loss; 0 if it is not lower than before training by `LEAST_GAIN`."""
    best = min(held_out, key=held_out.__getitem__)
    return best if held_out[best] <= (1 - LEAST_GAIN) * held_out[0] else 0


@dataclass(frozen=True)
class Draw:
    """What one forward pass is about.

    Attributes:
        rows: indices of the samples.
        random: Generator for every other random choice.
    """

    rows: list[int]
    random: random.Random


@dataclass(frozen=True)
class Judge:
    """Held-out samples that say which parameters to keep.

    Attributes:
        loss_of: The loss of one forward pass on them, a mean over its samples.
        draws: What the passes are about; the same at every look.
        passes: Number of passes of a look.
        every: Number of steps between two looks.
    """

    loss_of: Callable[[Draw], torch.Tensor]
    draws: "Draws"
    passes: int
    every: int


@dataclass
class _Progress:
    """How far training is.

    Attributes:
        loss: Loss, per step so far.
        held_out: See `TrainingReport`.
        best: Parameters that did best on held-out samples, by name.
    """

    loss: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    def note(self, held_out: float, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take down a look at held-out samples, and the parameters if they are the ones to keep so far."""
        self.held_out[len(self.loss)] = held_out
        if best_look(self.held_out) == len(self.loss):
            self.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}


@dataclass(frozen=True)
class Draws:
    """The samples of every forward pass: each once per epoch, shuffled anew in each."""

    count: int
    recipe: TrainingRecipe
    seed: int
    _orders: dict[int, list[int]] = field(default_factory=dict)

    def at(self, step: int, part: int) -> Draw:
        """Return the draw of one of a step's forward passes."""
        return self.of(step * self.recipe.gradient_accumulation + part)

    def of(self, number: int) -> Draw:
        """Return the draw of a forward pass by its number, counted from 0 over all steps."""
        recipe = self.recipe
        first = number * recipe.batch_size
        rows = [self._order(i // self.count)[i % self.count] for i in range(first, first + recipe.batch_size)]
        return Draw(rows, random.Random(f"{self.seed}, pass {number}"))

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(self.count))
            random.Random(f"{self.seed}, epoch {epoch}").shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch]


def train(
    model: PyramidGenerationMixin,
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[Draw], torch.Tensor],
    draws: Draws,
    state: Path | None = None,
    processes: Processes = ALONE,
    advance: Callable[[int], None] = lambda steps: None,
    judge: Judge | None = None,
) -> TrainingReport:
    """Train parameters of a model in place; afterwards no parameter of it asks for a gradient.

    Several processes share the forward passes of a step, add up their gradients and take the same step.

    Args:
        model: Model to train; in float16 the loss is scaled so that small gradients survive.
        parameters: those to train, float32, by name.
        loss_of: the loss of one forward pass, a mean over its samples.
        draws: Draws of samples and budgets for the passes; their recipe says how to train.
        state: a folder; the state is kept there every few steps, and found there after a kill; the main process's.
        processes: Processes that train together; the parameters are the same in all.
        advance: called with the number of steps done.
        judge: decides which parameters to keep; by default the last ones are.

    Raises:
        DpnError: if the loss or its gradient is not a finite number.
    """
    with training_mode(model, draws.recipe.gradient_checkpointing):
        progress = _steps(parameters, loss_of, draws, model.dtype, state, processes, advance, judge)
    for name, tensor in progress.best.items():
        parameters[name].data.copy_(tensor)
    model.requires_grad_(False)
    return TrainingReport(sum(p.numel() for p in parameters.values()), progress.loss, progress.held_out)


def _steps(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[Draw], torch.Tensor],
    draws: Draws,
    dtype: torch.dtype,
    state: Path | None,
    processes: Processes,
    advance: Callable[[int], None],
    judge: Judge | None,
) -> _Progress:
    """Take the steps that are left, and look at held-out samples now and then."""
    recipe = draws.recipe
    optimizer = _optimizer(parameters, recipe)
    scaler = torch.amp.GradScaler(next(iter(parameters.values())).device.type, enabled=dtype == torch.float16)
    path = state / STATE_FILE if state else None
    progress = _restore(processes.agree(_read(path, parameters)), parameters, optimizer, scaler)
    advance(len(progress.loss))
    for step in range(len(progress.loss), recipe.steps):
        if judge and step % judge.every == 0:
            progress.note(_look(judge, processes), parameters)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe.steps)
        loss = _backward(loss_of, draws, step, scaler, processes)
        processes.sum_gradients(parameters.values())
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)
        if not math.isfinite(loss) or not (scaler.is_enabled() or norm.isfinite()):
            raise DpnError(
                f"training stopped at step {step + 1} of {recipe.steps}: the loss is {loss:g}, the gradient's norm "
                f"{norm.item():g}; lower learning_rate (now {recipe.learning_rate:g}) or choose another dtype, and "
                "pass --restart"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        progress.loss.append(loss)
        if judge and step + 1 == recipe.steps:
            progress.note(_look(judge, processes), parameters)
        if path and ((step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps):
            _save(path, parameters, optimizer, scaler, progress)
        advance(1)
    return progress


def _backward(
    loss_of: Callable[[Draw], torch.Tensor], draws: Draws, step: int, scaler: Any, processes: Processes
) -> float:
    """Run this process's share of a step's passes, forward and backward; return the loss of the whole step."""
    parts, loss = draws.recipe.gradient_accumulation, 0.0
    with processes.as_one():
        for part in range(processes.index, parts, processes.count):
            part_loss = loss_of(draws.at(step, part)) / parts
            scaler.scale(part_loss).backward()
            loss += part_loss.item()
    return sum(processes.gather(loss))


@torch.no_grad()
def _look(judge: Judge, processes: Processes) -> float:
    """Return the mean loss of all held-out passes; this process runs its share."""
    with processes.as_one():
        parts = range(processes.index, judge.passes, processes.count)
        loss = sum(judge.loss_of(judge.draws.of(part)).item() for part in parts)
    return sum(processes.gather(loss)) / judge.passes


def _schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: a linear start, then a cosine to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def _optimizer(parameters: Mapping[str, nn.Parameter], recipe: TrainingRecipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters.values(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY)


def _save(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, scaler: Any, progress: _Progress) -> None:
    content = {
        "parameters": {name: parameter.detach().cpu() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "history": progress.loss,
        "held_out": progress.held_out,
        "best": {name: tensor.cpu() for name, tensor in progress.best.items()},
    }
    replace_file(path, lambda stage: torch.save(content, stage))


def _read(path: Path | None, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any] | None:
    """Return a kept state, or None if there is none, or it is damaged or of other parameters."""
    if path is None or not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - torch raises of every kind; a damaged state is trained again
        return None
    shapes = {name: tensor.shape for name, tensor in content["parameters"].items()}
    return content if shapes == {name: p.shape for name, p in parameters.items()} else None


def _restore(
    content: dict[str, Any] | None, parameters: Mapping[str, nn.Parameter], optimizer: Any, scaler: Any
) -> _Progress:
    """Bring a kept state back; return how far it was."""
    if content is None:
        return _Progress()
    for name, parameter in parameters.items():
        parameter.data.copy_(content["parameters"][name])
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    return _Progress(list(content["history"]), dict(content["held_out"]), dict(content["best"]))
