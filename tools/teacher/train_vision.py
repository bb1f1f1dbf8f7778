"""First stage: the vision tower learns what each patch shows. It stands in for CLIP's pre-training."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from dpn_cli.demo.pictures import Scene, Split, scenes
from tools.teacher.assembly import HIDDEN, MEAN, STD
from tools.teacher.labels import CLASSES, patch_labels
from tools.teacher.log import TrainingLog
from tools.teacher.optimise import Optimiser

BATCH = 64
RATE = 2e-3
ROUND = 400
PLATE_WEIGHT = 4.0
GLYPH = list(CLASSES).index("glyph")


class DenseHeads(nn.Module):
    """One linear classifier per attribute on every patch feature."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.classify = nn.Linear(HIDDEN, sum(CLASSES.values()))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return per attribute the class logits of shape (batch, patches, classes)."""
        logits: Tensor = self.classify(self.norm(features))
        return logits.split(list(CLASSES.values()), dim=-1)


def pixel_batch(batch: list[Scene]) -> Tensor:
    """Draw pictures as the processor would hand them to the model: shape (batch, 3, size, size)."""
    pixels = np.stack([np.asarray(scene.draw()) for scene in batch])
    return ((torch.from_numpy(pixels).float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return what the projector gets: shape (batch, patches, hidden)."""
    features: Tensor = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    return features


def train_vision(model: LlavaForConditionalGeneration, folder: Path, rounds: int, log: TrainingLog) -> DenseHeads:
    """Train the vision tower on dense labels, going on after the last round that ``folder`` holds.

    Args:
        model: The teacher; its vision tower is changed in place.
        folder: Where the state is kept after every round.
        rounds: Restarts of the schedule, each of ``ROUND`` steps on new pictures.
        log: Gets the loss and the accuracy per attribute.

    Returns:
        The classifiers, from which the projector starts.
    """
    tower, heads = model.model.vision_tower, DenseHeads()
    saved, first = folder / "vision.pt", 0
    if saved.exists():
        state = torch.load(saved)
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        first = state["rounds"]
    for number in range(first, rounds):
        _train_round(model, heads, number, log)
        torch.save({"tower": tower.state_dict(), "heads": heads.state_dict(), "rounds": number + 1}, saved)
    return heads


def _train_round(model: LlavaForConditionalGeneration, heads: DenseHeads, number: int, log: TrainingLog) -> None:
    tower = model.model.vision_tower
    layers = cast("nn.Module", tower.encoder.layers)
    inputs = [cast("nn.Module", tower.embeddings), cast("nn.Module", tower.pre_layrnorm)]
    optimiser = Optimiser([layers], [*inputs, heads], RATE, ROUND)
    stream = _batches("train", seed=number)
    for step in range(ROUND):
        pixels, labels = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            logits = heads(patch_features(model, pixels))
        weight = 1 + (PLATE_WEIGHT - 1) * (labels[:, GLYPH].flatten() > 0)
        loss = torch.stack([_balanced(each.float(), labels[:, i], weight) for i, each in enumerate(logits)]).sum()
        loss.backward()
        optimiser.step(step)
        if (step + 1) % 50 == 0:
            done = number * ROUND + step + 1
            log.write(stage="vision", step=done, loss=loss.item(), **_accuracy(model, heads))


def _batches(split: Split, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    stream = scenes(split, seed)
    while True:
        batch = [next(stream) for _ in range(BATCH)]
        yield pixel_batch(batch), torch.from_numpy(np.stack([patch_labels(scene) for scene in batch]))


def _balanced(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted cross-entropy, patches of class 0 counting as much as all others together."""
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    nothing = weight * (labels.flatten() == 0)
    something = weight - nothing
    return 0.5 * ((loss * nothing).sum() / (nothing.sum() + 1) + (loss * something).sum() / something.sum())


@torch.no_grad()
def _accuracy(model: LlavaForConditionalGeneration, heads: DenseHeads) -> dict[str, float]:
    pixels, labels = next(_batches("heldout"))
    logits = heads(patch_features(model, pixels))
    result = {}
    for index, (name, each) in enumerate(zip(CLASSES, logits, strict=True)):
        plates = labels[:, GLYPH] > 0
        result[name] = (each.argmax(-1) == labels[:, index])[plates].float().mean().item()
    return result
