"""Held-out accuracy per kind of question.

Greedy decoding gives an answer exactly when every token of it is the most likely one after those before it, so that one
pass over question and answer says what generating would.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dpn_cli.demo.questions import Turn
from tools.teacher.batches import IGNORE, Batch, Packer, drawn, pack
from tools.teacher.network import Decoder, answer_logits, patch_features
from tools.teacher.subject import Subject

LENGTH = 56
"""More tokens than any question with its answer has."""
AT_ONCE = 160  # pictures in a batch


@dataclass(frozen=True)
class Asked:
    """Held-out pictures with one question each, packed."""

    batch: Batch
    turns: list[Turn]


def held_out(packer: Packer, per_kind: int, seed: int = 1) -> list[Asked]:
    """Draw the same number of questions of every kind."""
    subject = packer.subject
    endless, rng = subject.scenes("heldout", seed), Random(seed)
    return _packed(packer, [_draw(subject, kind, endless, rng) for _ in range(per_kind) for kind in subject.kinds])


def in_two_turns(packer: Packer, count: int) -> list[Asked]:
    """Draw conversations of two turns, the second of which can only be understood after the first."""
    subject = packer.subject
    endless, rng = subject.scenes("heldout", 1), Random(1)
    found: list[tuple[Any, *tuple[Turn, ...]]] = []
    while len(found) < count:
        scene, turn = _draw(subject, subject.kinds[rng.randrange(len(subject.kinds))], endless, rng)
        more = subject.ask_on(turn, rng) if subject.ask_on else None
        found += [(scene, turn, more)] if more else []
    return _packed(packer, found)


def _packed(packer: Packer, found: Sequence[tuple[Any, *tuple[Turn, ...]]]) -> list[Asked]:
    asked = []
    for start in range(0, len(found), AT_ONCE):
        chunk = found[start : start + AT_ONCE]
        rows = [turns for _, *turns in chunk]
        length = LENGTH * max(map(len, rows))
        images = drawn(packer.subject, [scene for scene, *_ in chunk])
        asked.append(Asked(pack(images, rows, packer, length), [row[0] for row in rows]))
    return asked


def _draw(subject: Subject, kind: str, endless: Iterator[Any], rng: Random) -> tuple[Any, Turn]:
    while True:
        scene = next(endless)
        turn = subject.ask(kind, scene, rng)
        if turn:
            return scene, turn


@torch.no_grad()
def exact(model: LlavaForConditionalGeneration, packer: Packer, asked: Asked, decoder: Decoder | None = None) -> Tensor:
    """Say for every question of a batch whether the whole answer comes out right."""
    batch = asked.batch.to(next(model.parameters()).device)
    features = patch_features(model, batch.pixels)
    likeliest = answer_logits(model, packer.before, features, batch, decoder).argmax(-1)
    wrong = (likeliest != batch.answers) & (batch.answers != IGNORE)
    return (torch.bincount(batch.rows[wrong], minlength=len(batch.text)) == 0).cpu()


def by_kind(asked: list[Asked], scores: list[Tensor]) -> dict[str, float]:
    """Average the scores of batches per kind."""
    kinds = [turn.kind for each in asked for turn in each.turns]
    flat = torch.cat(scores).float().tolist()
    found: dict[str, list[float]] = {}
    for kind, score in zip(kinds, flat, strict=True):
        found.setdefault(kind, []).append(score)
    return {kind: sum(each) / len(each) for kind, each in found.items()}


def accuracy(model: LlavaForConditionalGeneration, packer: Packer, asked: list[Asked]) -> dict[str, float]:
    """Measure the accuracy per kind."""
    return by_kind(asked, [exact(model, packer, each) for each in asked])
