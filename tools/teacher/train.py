"""Train the embedded teacher from nothing, in one run: ``python -m tools.teacher.train --output DIR``."""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import LlavaForConditionalGeneration

from dpn_cli.demo.pictures import KINDS
from tools.teacher.assembly import build_model, build_processor
from tools.teacher.batches import Batch, Packer, batches
from tools.teacher.evaluate import accuracy, exact, held_out, in_two_turns
from tools.teacher.log import TrainingLog
from tools.teacher.trainer import Trainer

LOG_EVERY = 15.0


def train(output: Path, seconds: float, size: int, rate: float, workers: int, seed: int, compiled: bool) -> None:
    """Train for a while, store in bfloat16, and measure what is stored.

    Args:
        output: Folder of the finished checkpoint and its log.
        seconds: How long to train.
        size: Pictures per batch.
        rate: Peak learning rate.
        workers: Processes that draw pictures.
        seed: Of the initial weights and the pictures.
        compiled: Compile the layers.
    """
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    output.mkdir(parents=True, exist_ok=True)
    log = TrainingLog(output / "log.jsonl")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = build_processor()
    packer = Packer(processor.tokenizer)
    stream = batches(packer, size, workers, seed)
    model = build_model(processor.tokenizer).to(device)
    arguments = f"--seconds {seconds:g} --batch {size} --seed {seed}{' --compile' if compiled else ''}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    log.write(stage="start", arguments=arguments, versions=versions, batch=size, rate=rate, seed=seed)
    run(Trainer(model, packer, rate, compiled), stream, seconds, log)
    del stream
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
    stored = LlavaForConditionalGeneration.from_pretrained(output, dtype=torch.float32).to(device).eval()
    turns = torch.cat([exact(stored, packer, asked) for asked in in_two_turns(packer, 160)]).float().mean().item()
    log.write(stage="held out", **accuracy(stored, packer, held_out(packer, 50)), two_turns=turns)


def run(trainer: Trainer, stream: Iterator[Batch], seconds: float, log: TrainingLog) -> None:
    """Train until the time has gone."""
    began, logged, done = time.monotonic(), 0.0, 0.0
    while done < 1:
        trainer.step(next(stream), done)
        now = time.monotonic() - began
        done = now / seconds
        if now - logged > LOG_EVERY or done >= 1:
            log.write(**trainer.report(KINDS))
            logged = now


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded teacher of dpn.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument(
        "--seconds", type=float, default=225, help="enough on one H100; a CPU takes hundreds of times as long"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the layers: a minute, then faster")
    args = parser.parse_args()
    train(args.output, args.seconds, args.batch, args.rate, args.workers, args.seed, args.compile)


if __name__ == "__main__":
    main()
