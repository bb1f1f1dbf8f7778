"""How hard the teacher is to compress: what dropping and pooling visual tokens cost, and what attention does not find.

``python -m tools.teacher.compression CHECKPOINT`` prints the figures; nothing is retrained.
"""

import argparse
from collections.abc import Callable
from functools import partial
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tools.teacher.batches import IGNORE, Packer
from tools.teacher.evaluate import Asked, by_kind, exact, held_out
from tools.teacher.network import Decoder, embed, patch_features
from tools.teacher.subject import Subject
from tools.teacher.subjects import SUBJECTS


def decode_without(model: LlavaForConditionalGeneration, start: int, after: int, embeds: Tensor) -> Tensor:
    """Run the decoder so that nobody sees a visual token after the first ``after`` layers.

    Args:
        model: The teacher.
        start: Position of the first visual token.
        after: Layers that see them.
        embeds: Of whole prompts.
    """
    picture = torch.zeros(embeds.shape[1], dtype=torch.bool, device=embeds.device)
    picture[start : start + model.config.image_seq_length] = True
    return _masked(model, embeds, lambda layer: picture & (layer >= after))


def decode_pooled(model: LlavaForConditionalGeneration, start: int, cell: tuple[int, int], embeds: Tensor) -> Tensor:
    """Run the decoder on averages over cells of the picture, each at the position of its cell's first patch.

    Cells at the right and lower edge are smaller where the grid does not divide by them.
    """
    rows, columns = cell
    count = model.config.image_seq_length
    grid = isqrt(count)
    embeds, index = embeds.clone(), torch.arange(count, device=embeds.device)
    picture = embeds[:, start : start + count]
    cells = index // grid // rows * grid + index % grid // columns
    members = (cells[:, None] == cells).to(embeds.dtype)
    picture[:] = (members / members.sum(1, keepdim=True)) @ picture
    hidden = torch.zeros(embeds.shape[1], dtype=torch.bool, device=embeds.device)
    hidden[start : start + count] = (index // grid % rows > 0) | (index % grid % columns > 0)
    return _masked(model, embeds, lambda layer: hidden)


def _masked(model: LlavaForConditionalGeneration, embeds: Tensor, hidden_at: Callable[[int], Tensor]) -> Tensor:
    """Run the decoder layer by layer, each with keys that it must not see."""
    language = model.model.language_model
    length = embeds.shape[1]
    positions = torch.arange(length, device=embeds.device)[None]
    rotary = language.rotary_emb(embeds, positions)
    causal = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=embeds.device)
    state = embeds
    for number, layer in enumerate(language.layers):
        mask = (causal & ~hidden_at(number)[None]) | itself
        state = layer(state, attention_mask=mask[None, None], position_ids=positions, position_embeddings=rotary)
    return language.norm(state)


@torch.no_grad()
def attention_misses(model: LlavaForConditionalGeneration, packer: Packer, asked: Asked, layer: int) -> Tensor:
    """Say for each question whether attention overlooks what it needs.

    It does if some patch of the last look is not among the tenth of the patches that the last token of the question
    attends to most in a layer, the mean over the heads.
    """
    batch, grid = asked.batch.to(next(model.parameters()).device), packer.subject.grid
    embeds = embed(model, packer.before, patch_features(model, batch.pixels), batch.text)
    language = model.model.language_model
    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    rotary = language.rotary_emb(embeds, positions)
    state = embeds
    for each in language.layers[:layer]:
        state = each(state, position_ids=positions, position_embeddings=rotary)
    attention, start = language.layers[layer].self_attn, len(packer.before)
    normed = language.layers[layer].input_layernorm(state)
    heads = (*normed.shape[:2], -1, attention.head_dim)
    query, key = (each(normed).view(heads).transpose(1, 2) for each in (attention.q_proj, attention.k_proj))
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    real = batch.answers != IGNORE
    cue = torch.full((len(batch.text),), batch.text.shape[1], device=batch.text.device)
    last = start + grid**2 + cue.scatter_reduce(0, batch.rows[real], batch.where[real] % batch.text.shape[1], "amin")
    query = query[torch.arange(len(last), device=last.device), :, last]
    scores = (query[:, :, None] * key).sum(-1) / attention.head_dim**0.5
    scores.masked_fill_(positions[:, None] > last[:, None, None], float("-inf"))
    share = scores.softmax(-1).mean(1)[:, start : start + grid**2]
    top = torch.zeros_like(share, dtype=torch.bool).scatter_(1, share.topk(grid**2 // 10).indices, True).cpu()
    needed = [[row * grid + column for row, column in turn.looks[-1]] if turn.looks else [] for turn in asked.turns]
    return torch.tensor([not row[patches].all() for row, patches in zip(top, needed, strict=True)])


def figures(model: LlavaForConditionalGeneration, packer: Packer, asked: list[Asked]) -> dict[str, dict[str, float]]:
    """Measure everything; see the keys."""
    depth, start = len(model.model.language_model.layers), len(packer.before)
    ways: dict[str, Decoder | None] = {"whole": None}
    for name, after in (("a quarter", depth // 4), ("half", depth // 2), ("three quarters", depth * 3 // 4)):
        ways[f"none after {name}"] = partial(decode_without, model, start, after)
    for rows, columns in ((1, 2), (2, 2), (4, 4)):
        ways[f"pooled {rows}×{columns}"] = partial(decode_pooled, model, start, (rows, columns))
    found = {name: by_kind(asked, [exact(model, packer, each, way) for each in asked]) for name, way in ways.items()}
    for layer in (depth // 4 - 1, depth // 4):
        misses = [attention_misses(model, packer, each, layer) for each in asked]
        found[f"overlooked by attention in layer {layer}"] = by_kind(asked, misses)
    return found


def table(subject: Subject, found: dict[str, dict[str, float]]) -> str:
    """Format figures as a table, a row per kind."""
    lines = ["| kind | grain | " + " | ".join(found) + " |", "|---" * (len(found) + 2) + "|"]
    for kind, grain in subject.grains.items():
        values = " | ".join(f"{100 * each[kind]:.0f}" for each in found.values())
        lines.append(f"| {kind} | {grain} | {values} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description="Measure how hard a teacher is to compress.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--teacher", choices=SUBJECTS, default="demo")
    parser.add_argument("--per-kind", type=int, default=100)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.float32).to(device).eval()
    packer = Packer(SUBJECTS[args.teacher], LlavaProcessor.from_pretrained(args.checkpoint).tokenizer)
    print(table(packer.subject, figures(model, packer, held_out(packer, args.per_kind, seed=2))))  # noqa: T201


if __name__ == "__main__":
    main()
