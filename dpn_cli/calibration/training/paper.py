"""`objective: paper`: routers trained as the authors do, by the gradient through their probability gate.

Every site draws a rate from softmax(logits / 10), the visual tokens are scaled by its probability, 1×1 included, and
the loss is that of the answers plus a hinge that pushes for more pooling.

Source: the authors' code, llava_hr/hack/forward.py (the draw and the gate) and loss.py (the hinge). Where we depart:

- The layers before the first site stay frozen, and the others learn through an adapter or not at all, so that the
  teacher stays in memory and the base weights stay as they are; the authors train all of them.
- A rate that would leave too few tokens is not drawn; the authors draw again until one fits, which is the same
  distribution but may never end.
- Samples are pooled whatever is beside them in their batch; the authors pool none where one has no image.
- Where pooling is by convolution, the authors let every batch of enough samples take each rate at least once.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dpn_cli.calibration.passes import Trunk, run_trunk, student_logits, teacher_logits
from dpn_cli.calibration.teacher import Teacher
from dpn_cli.calibration.training.loop import Draw, Draws, TrainingReport, train
from dpn_cli.data.encoding import Example
from dpn_cli.inference.adapter import add_adapter
from dpn_cli.inference.scoring import divergence
from dpn_cli.modeling.routers import GATE_TEMPERATURE
from dpn_cli.modeling.state import Choice, PyramidState
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.processes import ALONE, Processes
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe, PaperRecipe


def train_as_paper(
    model: PyramidGenerationMixin,
    examples: Sequence[Example],
    recipe: CalibrationRecipe,
    *,
    pad_token_id: int,
    seed: int,
    state: Path | None = None,
    processes: Processes = ALONE,
    advance: Callable[[int], None] = lambda steps: None,
    other: Teacher | None = None,
) -> TrainingReport:
    """Train the routers and, if the recipe says so, an adapter that the model carries from then on.

    Args:
        model: converted with `gate: probability` and `router.output: logits`, without an adapter, in eval mode.
        examples: none of those that the result is judged by.
        recipe: Recipe, of which the sections `paper` and `heal` count.
        pad_token_id: fills up the shorter samples of a batch.
        seed: Random seed for sampling.
        state: a folder; a run that was killed goes on from there.
        processes: share the forward passes of every step.
        advance: called with the number of steps done.
        other: Teacher that is another model; None for the model itself.

    Raises:
        DpnError: if the loss or its gradient is not a finite number.
        MissingExtraError: without peft, where it is needed.
    """
    paper, lora = recipe.paper, recipe.heal
    model.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    if paper.train == "lora":
        parameters |= add_adapter(model, lora.rank, lora.alpha, lora.target_modules, seed)
    parameters |= dict(model.text_model.routers.requires_grad_(True).named_parameters(prefix="routers"))

    def loss_of(draw: Draw) -> torch.Tensor:
        batch = [examples[i] for i in draw.rows]
        trunk = run_trunk(model, batch, [True] * len(batch), pad_token_id, other if paper.loss == "kl" else None)
        return paper_loss(model, trunk, paper, draw.random)

    return train(model, parameters, loss_of, Draws(len(examples), paper, seed), state, processes, advance)


def paper_loss(model: PyramidGenerationMixin, trunk: Trunk, recipe: PaperRecipe, rng: random.Random) -> torch.Tensor:
    """Return CE to the answers (or KL to the teacher), the mean over tokens, plus the weighted routing loss."""
    sampler = Sampler(model.text_model, rng)
    if recipe.loss == "kl":
        teacher = teacher_logits(model, trunk)
        task = divergence(student_logits(model, trunk, sampler.choose), teacher, temperature=1.0).mean()
    else:
        task = F.cross_entropy(student_logits(model, trunk, sampler.choose), trunk.targets)
    return task + recipe.routing_weight * routing_loss(sampler.entries, recipe.routing_target)


def routing_loss(entries: Sequence[torch.Tensor], target: float) -> torch.Tensor:
    """Return max(0, target - mean(scale · probability)) over all samples and sites; 0 where nothing was routed.

    Args:
        entries: scale · probability of the likeliest rates, whatever was drawn, in tensors of any lengths.
        target: the mean above which there is nothing to push.

    Source: the authors' loss.py, where the lists of all sites are one and the same list. The scale is the index of
    the rate: theirs are written for three (0 for 1×1, 1 for 1×2, 2 for 2×2).
    """
    if not entries:
        return torch.tensor(0.0)
    return (target - torch.cat(list(entries)).mean()).clamp(min=0)


@dataclass
class Sampler:
    """Draws a rate per sample and site from softmax(logits / 10), among those offered.

    Attributes:
        text_model: Text model with the pyramid.
        rng: Random generator.
        entries: scale · probability of the likeliest rates so far, offered or not, a tensor per site.
    """

    text_model: Any
    rng: random.Random
    entries: list[torch.Tensor] = field(default_factory=list)

    def choose(self, state: PyramidState, site: int) -> Choice:
        """Draw for a batch; a sample without an image takes 1×1 and does not count."""
        logits = self.text_model.routers[site](self.text_model.router_features(state))
        probability = (logits / GATE_TEMPERATURE).softmax(-1)  # [B, E]
        experts = []
        for row, grids in zip(probability.tolist(), state.grids, strict=True):
            offered = self.text_model.pyramid.offered(site, grids)
            experts.append(self.rng.choices(offered, [row[k] for k in offered])[0])
        index = torch.tensor(experts, device=logits.device)
        taken = probability.gather(1, index[:, None])[:, 0]
        highest, likeliest = probability.max(-1)
        routed = torch.tensor([bool(grids) for grids in state.grids], device=logits.device)
        self.entries.append((likeliest * highest)[routed])
        return Choice(experts, taken)
