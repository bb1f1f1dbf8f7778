"""Rows for training: one picture and several questions about it, none of which sees the others.

Each turn attends to the picture and to itself, at the positions it would have alone, so that a row is
exactly as many one-question prompts, at the cost of one picture.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dpn_cli.demo.pictures import GRID, KINDS, Scene, Turn
from tools.teacher.assembly import EOS, IMAGE, prompt

TURNS = 9
WEIGHTS = {
    "background": 0.2,
    "count": 0.2,
    "colour": 0.5,
    "shape": 1.5,
    "letter": 1.5,
    "stack": 1.5,
    "pair": 2.0,
}
IGNORE = -100


@dataclass(frozen=True)
class Rows:
    """A packed batch.

    Attributes:
        input_ids: Shape (batch, length), picture first.
        position_ids: Shape (batch, length), each turn counted from the end of the picture.
        attention_mask: Shape (batch, 1, length, length), true where a query sees a key.
        labels: Shape (batch, length), the next token where it belongs to an answer, else ``IGNORE``.
        kinds: Shape (batch, length), the index of the kind at each answer's first token, else -1.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    kinds: Tensor


class Packer:
    """Turns scenes into packed rows.

    Args:
        tokenizer: The teacher's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        before, after = prompt("").split(IMAGE)
        self._tail = after.removeprefix("\n")
        self.prefix: list[int] = tokenizer(before + IMAGE * GRID**2 + "\n")["input_ids"]
        self.pad = int(tokenizer.pad_token_id)

        @cache
        def encode(question: str, answer: str) -> tuple[list[int], int]:
            ask = tokenizer(question + self._tail, add_special_tokens=False)["input_ids"]
            reply = tokenizer(f" {answer}{EOS}", add_special_tokens=False)["input_ids"]
            return ask + reply, len(ask)

        self._encode = encode

    def pack(self, batch: list[Scene], rng: np.random.Generator) -> Rows:
        """Pack scenes with up to ``TURNS`` questions each, hard ones more often."""
        turns = [_choose(scene.turns(rng), rng) for scene in batch]
        encoded = [[self._encode(turn.question, turn.answer) for turn in row] for row in turns]
        start = len(self.prefix)
        length = start + max(sum(len(ids) for ids, _ in row) for row in encoded)
        ids = torch.full((len(batch), length), self.pad)
        positions = torch.zeros_like(ids)
        owner = torch.full_like(ids, -1)
        labels, kinds = torch.full_like(ids, IGNORE), torch.full_like(ids, -1)
        ids[:, :start] = torch.tensor(self.prefix)
        positions[:, :start] = torch.arange(start)
        owner[:, :start] = 0
        for row, (chosen, pieces) in enumerate(zip(turns, encoded, strict=True)):
            at = start
            for number, (turn, (tokens, asked)) in enumerate(zip(chosen, pieces, strict=True), 1):
                end = at + len(tokens)
                ids[row, at:end] = torch.tensor(tokens)
                positions[row, at:end] = torch.arange(start, start + len(tokens))
                owner[row, at:end] = number
                labels[row, at + asked - 1 : end - 1] = torch.tensor(tokens[asked:])
                kinds[row, at + asked - 1] = KINDS.index(turn.kind)
                at = end
        same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return Rows(ids, positions, (same & causal)[:, None], labels, kinds)


def _choose(turns: list[Turn], rng: np.random.Generator) -> list[Turn]:
    weights = np.array([WEIGHTS[turn.kind] for turn in turns])
    count = min(TURNS, len(turns))
    return [turns[i] for i in rng.choice(len(turns), size=count, replace=False, p=weights / weights.sum())]
