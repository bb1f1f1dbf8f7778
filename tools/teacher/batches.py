"""Batches for training: pictures, each with a conversation of several turns, made by several processes."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from dpn_cli.demo.questions import Turn
from tools.teacher.assembly import EOS, IMAGE, prompt
from tools.teacher.subject import Subject

USES, APART = 4, 16
"""How many conversations there are about each picture, and after how many batches of a process the next one comes."""
IGNORE = -100
MOST = 18  # kinds of question that are drawn for a conversation
REPEAT = 0.2
"""How often a question stays whose answer an earlier turn has already read from the same patches."""
MORE = 0.3
"""How often another question follows that can only be understood after the one before."""


@dataclass
class Batch:
    """Pictures with conversations.

    Attributes:
        pixels: Bytes, shape (batch, size, size, 3).
        text: Token ids after the picture, shape (batch, length).
        where: Places in the flattened text whose next token belongs to an answer, in order.
        answers: That next token, for each of these places; at the end of the list ``IGNORE`` for places left over.
        kinds: The index of the kind of question, likewise; -1 where an answer ends.
        patches: Dense labels, shape (batch, attributes, patches).
    """

    pixels: Tensor
    text: Tensor
    where: Tensor
    answers: Tensor
    kinds: Tensor
    patches: Tensor

    @property
    def rows(self) -> Tensor:
        """Say which picture each answer token is about."""
        return self.where // self.text.shape[1]

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, without waiting."""
        return Batch(*(each.to(device, non_blocking=True) for each in vars(self).values()))

    def pin_memory(self) -> "Batch":
        """Copy to memory from which a GPU reads quickly."""
        return Batch(*(each.pin_memory() for each in vars(self).values()))


class Packer:
    """Turns questions and answers into rows of tokens.

    Args:
        subject: What the questions are about.
        tokenizer: The teacher's tokenizer.
    """

    def __init__(self, subject: Subject, tokenizer: PreTrainedTokenizerFast) -> None:
        self.subject = subject
        self._encode = lru_cache(300_000)(
            lambda text: tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        )
        before, after = prompt("?").split(IMAGE)
        self._first, self._tail = after.split("?")
        self.before = torch.tensor(tokenizer(before)["input_ids"])
        self.pad = int(tokenizer.pad_token_id)

    def turn(self, turn: Turn, first: bool) -> tuple[list[int], list[int]]:
        """Return the tokens of the question, up to the cue for the answer, and those of the answer, up to its end."""
        opening = self._first if first else "USER: "
        return self._encode(opening + turn.question + self._tail), self._encode(f" {turn.answer}{EOS}")

    def row(self, turns: list[Turn], length: int) -> NDArray[np.int16]:
        """Return text, next answer tokens and kinds of a conversation, shape (3, length), as far as there is room."""
        row = np.array([[self.pad], [IGNORE], [-1]], dtype=np.int16).repeat(length, axis=1)
        at = 0
        for turn in turns:
            question, answer = self.turn(turn, first=at == 0)
            start, end = at + len(question), at + len(question) + len(answer)
            if end > length:
                break
            row[0, at:end] = question + answer
            row[1, start - 1 : end - 1] = answer
            row[2, start - 1 : end - 2] = self.subject.kinds.index(turn.kind)
            at = end
        return row


def conversation(subject: Subject, scene: Any, rng: Random) -> list[Turn]:
    """Draw questions about a scene, no two alike."""
    turns: list[Turn] = []
    known: set[object] = set()
    for kind in rng.choices(subject.kinds, tuple(subject.weights[kind] for kind in subject.kinds), k=MOST):
        turn = subject.ask(kind, scene, rng)
        if turn is None or turn.question in known or (turn.looks[-1:] in known and rng.random() > REPEAT):
            continue
        known.update((turn.question, turn.looks[-1:]) if turn.looks else (turn.question,))
        turns.append(turn)
        more = subject.ask_on(turn, rng) if subject.ask_on and rng.random() < MORE else None
        turns += [more] if more else []
    return turns


def drawn(subject: Subject, pictures: list[Any]) -> tuple[Tensor, Tensor]:
    """Draw pictures: their pixels and dense labels."""
    pixels = np.stack([subject.draw(scene) for scene in pictures])
    return torch.from_numpy(pixels), torch.from_numpy(np.stack([subject.labels(scene) for scene in pictures]))


def pack(images: tuple[Tensor, Tensor], conversations: list[list[Turn]], packer: Packer, length: int) -> Batch:
    """Put drawn pictures and conversations about them into a batch of fixed shapes."""
    rows = torch.from_numpy(np.stack([packer.row(turns, length) for turns in conversations], axis=1)).long()
    text, answers, kinds = rows.flatten(1)
    where = torch.argsort((answers == IGNORE).byte(), stable=True)[: packer.subject.answers * len(conversations)]
    return Batch(images[0], text.view(-1, length), where, answers[where], kinds[where], images[1])


class Stream(IterableDataset[Batch]):
    """An endless stream of batches; every process draws its own.

    Args:
        packer: Makes the rows.
        size: Pictures per batch.
        seed: Names the stream.
    """

    def __init__(self, packer: Packer, size: int, seed: int) -> None:
        self._packer, self._size, self._seed = packer, size, seed

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end."""
        torch.set_num_threads(1)
        worker = get_worker_info()
        seed = 1000 * (self._seed + 1) + (worker.id if worker else 0)
        subject = self._packer.subject
        endless, rng = subject.scenes("train", seed), Random(seed)
        again: deque[tuple[list[Any], tuple[Tensor, Tensor]]] = deque()
        while True:
            pictures = [next(endless) for _ in range(self._size)]
            images = drawn(subject, pictures)
            again.append((pictures, images))
            for known, shown in [again[-1 - use * APART] for use in range(USES) if use * APART < len(again)]:
                turns = [conversation(subject, scene, rng) for scene in known]
                yield pack(shown, turns, self._packer, subject.text)
            if len(again) > (USES - 1) * APART:
                again.popleft()


def batches(packer: Packer, size: int, workers: int, seed: int) -> Iterator[Batch]:
    """Yield training batches, drawn ahead of time by ``workers`` processes (0: by this one)."""
    ahead = 4 if workers else None
    stream, pin = Stream(packer, size, seed), torch.cuda.is_available()
    return iter(DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=pin, prefetch_factor=ahead))
