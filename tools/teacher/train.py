"""Train the embedded teacher from nothing: ``python -m tools.teacher.train --output DIR``."""

import argparse
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.teacher.assembly import build_model, build_processor
from tools.teacher.card import write_card
from tools.teacher.grow import grow
from tools.teacher.log import TrainingLog
from tools.teacher.packing import Packer
from tools.teacher.train_language import align_projector, train_language
from tools.teacher.train_vision import train_vision


def train(output: Path, work: Path, vision_rounds: int, language_steps: int, seed: int) -> None:
    """Train, store in bfloat16, and write the model card from the stored model.

    Args:
        output: Folder of the finished checkpoint.
        work: Folder of the training state; a second call goes on from it.
        vision_rounds: Rounds of the first stage.
        language_steps: Optimiser steps of the second stage.
        seed: Of the initial weights.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    log = TrainingLog(work / "log.jsonl")
    processor = build_processor()
    model = build_model(processor.tokenizer)
    heads = train_vision(model, work, vision_rounds, log)
    model.model.vision_tower.requires_grad_(False)
    align_projector(model, heads)
    train_language(model, Packer(processor.tokenizer), work, language_steps, log)
    grow(model).to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
    write_card(
        LlavaForConditionalGeneration.from_pretrained(output, dtype=torch.float32).eval(),
        LlavaProcessor.from_pretrained(output),
        log.records(),
        output,
    )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded teacher of dpn.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument("--work", type=Path, help="folder of the training state (default: OUTPUT.work)")
    parser.add_argument("--vision-rounds", type=int, default=3)
    parser.add_argument("--language-steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = args.work or args.output.with_name(args.output.name + ".work")
    train(args.output, work, args.vision_rounds, args.language_steps, args.seed)


if __name__ == "__main__":
    main()
