"""First stage: the vision tower learns what each patch shows. It stands in for CLIP's pre-training."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from dpn_cli.demo.assembly import HIDDEN, MEAN, STD
from dpn_cli.demo.labels import CLASSES, patch_labels
from dpn_cli.demo.log import TrainingLog
from dpn_cli.demo.optimise import Optimiser
from dpn_cli.demo.pictures import Scene, Split, scenes

BATCH = 64
RATE = 2e-3


class DenseHeads(nn.Module):
    """One linear classifier per attribute on every patch feature."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.classify = nn.Linear(HIDDEN, sum(CLASSES.values()))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return per attribute the class logits of shape (batch, patches, classes)."""
        return self.classify(self.norm(features)).split(list(CLASSES.values()), dim=-1)


def pixel_batch(batch: list[Scene]) -> Tensor:
    """Draw pictures as the processor would hand them to the model: shape (batch, 3, size, size)."""
    pixels = np.stack([np.asarray(scene.draw()) for scene in batch])
    return ((torch.from_numpy(pixels).float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return what the projector gets: shape (batch, patches, hidden)."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def train_vision(
    model: LlavaForConditionalGeneration, folder: Path, steps: int, log: TrainingLog
) -> DenseHeads:
    """Train the vision tower on dense labels, or load it where an earlier run in ``folder`` did.

    Args:
        model: The teacher; its vision tower is changed in place.
        folder: Where the finished stage is kept.
        steps: Optimiser steps.
        log: Gets the loss and the accuracy per attribute.

    Returns:
        The classifiers, from which the projector starts.
    """
    tower, heads = model.model.vision_tower, DenseHeads()
    saved = folder / "vision.pt"
    if saved.exists():
        state = torch.load(saved)
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        return heads
    layers = cast(nn.Module, tower.encoder.layers)
    embeddings = cast(nn.Module, tower.embeddings)
    norm = cast(nn.Module, tower.pre_layrnorm)
    optimiser = Optimiser([layers], [embeddings, norm, heads], RATE, steps)
    stream = _batches("train")
    for step in range(steps):
        pixels, labels = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            logits = heads(patch_features(model, pixels))
        loss = torch.stack([_balanced(each.float(), labels[:, i]) for i, each in enumerate(logits)]).sum()
        loss.backward()
        optimiser.step(step)
        if step % 50 == 49 or step == steps - 1:
            log.write(stage="vision", step=step + 1, loss=loss.item(), **_accuracy(model, heads))
    torch.save({"tower": tower.state_dict(), "heads": heads.state_dict()}, saved)
    return heads


def _batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    stream = scenes(split)
    while True:
        batch = [next(stream) for _ in range(BATCH)]
        yield pixel_batch(batch), torch.from_numpy(np.stack([patch_labels(scene) for scene in batch]))


def _balanced(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy, patches of class 0 weighing as much as all others together."""
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    nothing = (labels.flatten() == 0).float()
    return 0.5 * (
        (loss * nothing).sum() / (nothing.sum() + 1) + (loss * (1 - nothing)).mean() / (1 - nothing).mean()
    )


@torch.no_grad()
def _accuracy(model: LlavaForConditionalGeneration, heads: DenseHeads) -> dict[str, float]:
    pixels, labels = next(_batches("heldout"))
    logits = heads(patch_features(model, pixels))
    result = {}
    for index, (name, each) in enumerate(zip(CLASSES, logits, strict=True)):
        something = labels[:, index] > 0
        result[name] = (each.argmax(-1) == labels[:, index])[something].float().mean().item()
    return result
