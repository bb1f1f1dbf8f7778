"""Second stage: projector and language model learn to answer, over the frozen vision tower."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from transformers import LlavaForConditionalGeneration

from dpn_cli.demo.pictures import KINDS, Scene, scenes
from tools.teacher.assembly import HIDDEN
from tools.teacher.labels import CLASSES, patch_labels
from tools.teacher.log import TrainingLog
from tools.teacher.optimise import Optimiser
from tools.teacher.packing import IGNORE, Packer, Rows
from tools.teacher.train_vision import DenseHeads, patch_features, pixel_batch

BATCH = 16
RATE = 2e-3
SAVE_EVERY = 100


@torch.no_grad()
def align_projector(model: LlavaForConditionalGeneration, heads: DenseHeads) -> None:
    """Start the projector from the dense classifiers, so that every attribute enters with equal strength.

    The first rows of ``linear_1`` are the classifiers, each scaled to +2 where its class is present and
    -1 where it is not; the other rows are random directions of the whitened features.
    """
    stream = scenes("train", seed=99)
    batch = [next(stream) for _ in range(256)]
    features = patch_features(model, pixel_batch(batch)).flatten(0, 1)
    labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in batch]))
    hits = torch.cat([one_hot(labels[:, i].flatten(), size) for i, size in enumerate(CLASSES.values())], dim=-1).to(
        features
    )
    centre = features.mean(0)
    values, vectors = torch.linalg.eigh((features - centre).T.cov())
    rows = heads.classify.weight
    scores = (features - centre) @ rows.T
    present = (scores * hits).sum(0) / hits.sum(0)
    absent = (scores * (1 - hits)).sum(0) / (1 - hits).sum(0)
    scale = 3 / (present - absent)
    whiten = (vectors / (values + 1e-3 * values.max()).sqrt()).T
    random = nn.init.orthogonal_(torch.empty(HIDDEN - len(rows), HIDDEN)) @ whiten
    weight = torch.cat([rows * scale[:, None], random])
    bias = torch.cat([-1 - absent * scale, torch.zeros(len(random))])
    projector = model.model.multi_modal_projector
    projector.linear_1.weight.copy_(weight)
    projector.linear_1.bias.copy_(bias - weight @ centre)
    nn.init.orthogonal_(projector.linear_2.weight, gain=0.4)
    nn.init.zeros_(projector.linear_2.bias)


def train_language(
    model: LlavaForConditionalGeneration, packer: Packer, folder: Path, steps: int, log: TrainingLog
) -> None:
    """Train projector and language model, going on where an earlier run in ``folder`` stopped.

    Args:
        model: The teacher with its trained vision tower and aligned projector; changed in place.
        packer: Makes the rows.
        folder: Where the state is kept every ``SAVE_EVERY`` steps.
        steps: Optimiser steps.
        log: Gets the loss and the held-out accuracy per kind of question.
    """
    language = model.model.language_model
    optimiser = Optimiser(
        [cast("nn.Module", language.layers)],
        [language.embed_tokens, language.norm, model.lm_head, model.model.multi_modal_projector],
        RATE,
        steps,
    )
    saved, first = folder / "language.pt", 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    stream, rng = scenes("train", seed=100 + first), np.random.default_rng(first)
    for step in range(first, steps):
        loss = _loss(model, packer, [next(stream) for _ in range(BATCH)], rng)
        loss.backward()
        optimiser.step(step)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log.write(stage="language", step=step + 1, loss=loss.item(), **_accuracy(model, packer))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)


def _answers(model: LlavaForConditionalGeneration, rows: Rows, batch: list[Scene]) -> Tensor:
    """Return the logits, shape (answer tokens, vocabulary), at every position that has a label."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            features = patch_features(model, pixel_batch(batch))
        images = model.model.multi_modal_projector(features)
        embeds = model.get_input_embeddings()(rows.input_ids)
        picture = (rows.input_ids == model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(picture, images.to(embeds.dtype))
        hidden = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=rows.attention_mask,
            position_ids=rows.position_ids,
            use_cache=False,
        ).last_hidden_state
        logits: Tensor = model.lm_head(hidden[rows.labels != IGNORE])
    return logits.float()


def _loss(model: LlavaForConditionalGeneration, packer: Packer, batch: list[Scene], rng: np.random.Generator) -> Tensor:
    rows = packer.pack(batch, rng)
    return cross_entropy(_answers(model, rows, batch), rows.labels[rows.labels != IGNORE])


@torch.no_grad()
def _accuracy(model: LlavaForConditionalGeneration, packer: Packer) -> dict[str, float]:
    """Measure accuracy of the first answer token per kind, on the same held-out pictures every time."""
    stream = scenes("heldout")
    batch = [next(stream) for _ in range(4 * BATCH)]
    rows = packer.pack(batch, np.random.default_rng(0))
    where = rows.labels != IGNORE
    right = _answers(model, rows, batch).argmax(-1) == rows.labels[where]
    kinds = rows.kinds[where]
    return {kind: right[kinds == i].float().mean().item() for i, kind in enumerate(KINDS)}
