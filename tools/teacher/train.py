"""Train a teacher from nothing, in one run: ``python -m tools.teacher.train --output DIR``."""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
import transformers
from transformers import LlavaForConditionalGeneration

from tools.teacher.batches import Batch, Packer, batches
from tools.teacher.evaluate import accuracy, exact, held_out, in_two_turns
from tools.teacher.log import TrainingLog
from tools.teacher.subjects import SUBJECTS
from tools.teacher.trainer import Trainer

LOG_EVERY, SAVE_EVERY = 15.0, 300.0
"""Seconds."""


def train(
    name: str,
    output: Path,
    seconds: float,
    size: int,
    rate: float,
    workers: int,
    seed: int,
    compiled: bool,
) -> None:
    """Train for a while, store in bfloat16, and measure what is stored.

    Args:
        name: Of the subject.
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
    subject = SUBJECTS[name]
    processor = subject.build_processor()
    packer = Packer(subject, processor.tokenizer)
    stream = batches(packer, size, workers, seed)
    model = subject.build_model(processor.tokenizer).to(device)
    arguments = f"--teacher {name} --seconds {seconds:g} --batch {size} --seed {seed}{' --compile' if compiled else ''}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    log.write(stage="start", arguments=arguments, versions=versions, batch=size, rate=rate, seed=seed)
    processor.save_pretrained(output)
    run(Trainer(model, packer, rate, compiled), stream, seconds, log, lambda: _store(model, output))
    del stream
    stored = LlavaForConditionalGeneration.from_pretrained(output, dtype=torch.float32).to(device).eval()
    found = accuracy(stored, packer, held_out(packer, 50))
    if subject.ask_on:
        turns = torch.cat([exact(stored, packer, asked) for asked in in_two_turns(packer, 160)])
        found["two_turns"] = turns.float().mean().item()
    log.write(stage="held out", **found)


def _store(model: LlavaForConditionalGeneration, output: Path) -> None:
    """Store the weights as they are, in bfloat16; a run that breaks off leaves the last ones."""
    deepcopy(model).to(torch.bfloat16).save_pretrained(output)


def run(trainer: Trainer, stream: Iterator[Batch], seconds: float, log: TrainingLog, store: Callable[[], None]) -> None:
    """Train until the time has gone, and store the weights now and then and in the end."""
    began, logged, stored, done = time.monotonic(), 0.0, 0.0, 0.0
    while done < 1:
        trainer.step(next(stream), done)
        now = time.monotonic() - began
        done = now / seconds
        if now - logged > LOG_EVERY or done >= 1:
            log.write(**trainer.report())
            logged = now
        if now - stored > SAVE_EVERY or done >= 1:
            store()
            stored = now


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train a teacher of dpn.")
    parser.add_argument("--teacher", choices=SUBJECTS, default="demo", help="the embedded one, or that of benchmarks")
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
    options = vars(args)
    train(options.pop("teacher"), size=options.pop("batch"), compiled=options.pop("compile"), **options)


if __name__ == "__main__":
    main()
