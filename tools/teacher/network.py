"""The teacher as it is trained: the tower with dense classifiers, and the answers to packed conversations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from tools.teacher.assembly import MEAN, STD
from tools.teacher.batches import Batch
from tools.teacher.subject import Subject

WRITTEN_WEIGHT = 4.0

Decoder = Callable[[Tensor], Tensor]
"""From embeddings to the last hidden states, both of shape (batch, length, width)."""


class DenseHeads(nn.Module):
    """One linear classifier per dense label on every patch feature; they are thrown away after training.

    Args:
        subject: Has the labels.
        width: Size of a patch feature.
    """

    def __init__(self, subject: Subject, width: int) -> None:
        super().__init__()
        self._sizes, self._written = list(subject.classes.values()), list(subject.classes).index(subject.written)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.classify = nn.Linear(width, sum(self._sizes))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy summed over the attributes; patches with writing count more."""
        logits = self.classify(self.norm(features)).float().split(self._sizes, dim=-1)
        weight = 1 + (WRITTEN_WEIGHT - 1) * (labels[:, self._written].flatten() > 0)
        losses = [
            (weight * cross_entropy(each.flatten(0, 1), labels[:, i].flatten(), reduction="none")).sum()
            for i, each in enumerate(logits)
        ]
        return torch.stack(losses).sum() / weight.sum()


def tower_of(model: LlavaForConditionalGeneration) -> Any:
    """Return what holds the layers of the vision tower, in any version of transformers."""
    return getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return what the projector gets for pictures in bytes: shape (batch, patches, width)."""
    images = ((pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).contiguous()
    tower = tower_of(model)
    embedded = tower.embeddings(images)
    if hasattr(tower, "pre_layrnorm"):  # CLIP has it, and a class token; SigLIP has neither
        embedded = tower.pre_layrnorm(embedded)
    features: Tensor = tower.encoder(inputs_embeds=embedded).last_hidden_state[:, -model.config.image_seq_length :]
    return features


def embed(model: LlavaForConditionalGeneration, before: Tensor, features: Tensor, text: Tensor) -> Tensor:
    """Return the embeddings of whole prompts: what stands before the picture, the picture, the text after it."""
    words = model.get_input_embeddings()
    opening = words(before.to(text.device)).expand(len(text), -1, -1)
    images = model.model.multi_modal_projector(features)
    return torch.cat([opening.to(images.dtype), images, words(text).to(images.dtype)], dim=1)


def decode(model: LlavaForConditionalGeneration, embeds: Tensor) -> Tensor:
    """Run the decoder on whole sequences."""
    language = model.model.language_model
    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    rotary = language.rotary_emb(embeds, positions)
    for layer in language.layers:
        embeds = layer(embeds, position_ids=positions, position_embeddings=rotary)
    hidden: Tensor = language.norm(embeds)
    return hidden


def answer_logits(
    model: LlavaForConditionalGeneration, before: Tensor, features: Tensor, batch: Batch, decoder: Decoder | None = None
) -> Tensor:
    """Return the logits that give each answer token, shape (answer tokens, vocabulary)."""
    embeds = embed(model, before, features, batch.text)
    hidden = decoder(embeds) if decoder else decode(model, embeds)
    logits: Tensor = model.lm_head(hidden[:, -batch.text.shape[1] :].flatten(0, 1).index_select(0, batch.where))
    return logits.float()
