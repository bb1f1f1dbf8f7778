"""Measuring the latency of a checkpoint's folder: prompts in, every method's figures out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpn_cli.checkpoint.layout import IMAGE_SIZE, TEXT_TOKENS, LlavaLayout, open_converted
from dpn_cli.checkpoint.locks import in_use
from dpn_cli.data.encoding import prompts as encode_prompts
from dpn_cli.data.encoding import token_limit
from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.data.samples import Sample
from dpn_cli.errors import DataError, UsageError
from dpn_cli.evaluation.latency import Inputs, Latency, measure_latency, synthetic_inputs
from dpn_cli.evaluation.lineup import Lineup, line_up
from dpn_cli.evaluation.spending import unmet
from dpn_cli.inference.dtypes import compute_dtype
from dpn_cli.inference.loading import default_device, load_opened, load_opened_processor, max_positions
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.experts import num_tokens
from dpn_cli.pyramid.reach import typical_length, validate_in_table
from dpn_cli.pyramid.route import parse_route
from dpn_cli.reporter import SILENT, Reporter


@dataclass(frozen=True)
class SyntheticPrompts:
    """Prompts of noise and random words.

    Attributes:
        images: number of images per sample.
        image_size: Height and width of the images in pixels.
        text_tokens: text tokens of the samples of a batch, in turn; None for as many as in the calibration data, or
            else `TEXT_TOKENS`.
    """

    images: int = 1
    image_size: tuple[int, int] = IMAGE_SIZE
    text_tokens: Sequence[int] | None = None


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how often.

    Attributes:
        budgets: mean fractions of the prefill FLOPs; with neither budgets nor routes, what the checkpoint is set to is
            measured.
        routes: routes, each the same for all samples, as `parse_route` reads them.
        against: names from `BASELINES` to compare with.
        batch_sizes: batch sizes, each measured separately.
        new_tokens: number of tokens to generate for every sample.
        rounds: number of timed rounds after one warm-up round.
        dtype: dtype to compute in, see `compute_dtype`.
    """

    budgets: Sequence[float] = ()
    routes: Sequence[str] = ()
    against: Sequence[str] = ()
    batch_sizes: Sequence[int] = (1,)
    new_tokens: int = 16
    rounds: int = 8
    dtype: str = "auto"


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        folder: the checkpoint folder.
        has_data: whether the prompts were real.
        results: the measurements at every batch size.
        lineups: Methods that were measured, for every batch size.
    """

    folder: Path
    has_data: bool
    results: Sequence[Latency]
    lineups: Sequence[Lineup]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        runs = [
            result.to_dict() | {"budgets": [each.to_dict() for each in found.spendings], "remarks": found.remarks}
            for result, found in zip(self.results, self.lineups, strict=True)
        ]
        return {"checkpoint": str(self.folder), "runs": runs}


def bench_folder(
    folder: Path, prompts: DataOptions | SyntheticPrompts, options: BenchOptions, reporter: Reporter = SILENT
) -> Bench:
    """Measure a converted or exported checkpoint beside the original and other methods, in turns in one process.

    Args:
        folder: the checkpoint folder.
        prompts: the data to take prompts from (of the demo, the held-out pictures), or what synthetic prompts are like.
        options: Options of the measurement.
        reporter: Reporter of remarks on the figures, and of the progress.

    Raises:
        DataError: if there are too few samples with an image.
        UsageError: if a budget or a route is not possible here.
    """
    data = prompts if isinstance(prompts, DataOptions) else None
    with in_use(folder):
        checkpoint, layout, pyramid = open_converted(folder)
        routes = [parse_route(route, pyramid.sites) for route in options.routes]
        validate_in_table(options.budgets, pyramid)
        if isinstance(prompts, SyntheticPrompts):
            _check_length(prompts, layout, max_positions(checkpoint), options.new_tokens)
        with reporter.waiting("opening processor"):
            processor = load_opened_processor(checkpoint, layout)
        check = token_limit(processor, layout, max_positions(checkpoint), options.new_tokens)
        drawn = _draw(data, max(options.batch_sizes), options.rounds, check, reporter) if data else []
        dtype = compute_dtype(checkpoint, layout, options.dtype, default_device(), reporter.note)
        with reporter.waiting("loading the model"):
            model = load_opened(checkpoint, pyramid, dtype, device_map=default_device())
    results, lineups = [], []
    for batch_size in options.batch_sizes:
        if isinstance(prompts, SyntheticPrompts):
            batches = [_synthetic(prompts, model, processor, batch_size)] * options.rounds
        else:
            rounds = _in_batches(drawn, batch_size, options.rounds)
            batches = [encode_prompts(samples, processor, torch.device("cpu")) for samples in rounds]
        with reporter.waiting("setting methods"):
            found = line_up(model, batches, options.budgets, routes, options.against, has_data=data is not None)
        for remark in found.remarks:
            reporter.note(remark)
        with reporter.progress(f"batch of {batch_size}", (options.rounds + 1) * len(found.methods)) as advance:
            results.append(measure_latency(model, found.methods, batches, options.new_tokens, advance))
        lineups.append(found)
        for line in unmet(found.spendings, pyramid, folder, data) if data else ():
            reporter.note(line)
    return Bench(folder, data is not None, results, lineups)


def _check_length(prompts: SyntheticPrompts, layout: LlavaLayout, positions: int, new_tokens: int) -> None:
    """Check that the model takes synthetic prompts and their answers.

    Raises:
        UsageError: if it does not.
    """
    visual = num_tokens(layout.image_grids([prompts.image_size] * prompts.images))
    tokens = visual + max(prompts.text_tokens or (0,)) + new_tokens
    if tokens > positions:
        raise UsageError(
            f"a prompt of {tokens} tokens, with its {visual} visual and {new_tokens} new ones, is asked for, but the "
            f"model takes {positions}: lower --text-tokens, --images or --new-tokens"
        )


def _synthetic(prompts: SyntheticPrompts, model: PyramidGenerationMixin, processor: Any, batch_size: int) -> Inputs:
    """Return a batch of images of noise and random words."""
    noise = np.random.default_rng(0).integers(0, 255, (*prompts.image_size, 3), dtype=np.uint8)
    images = [Image.fromarray(noise)] * prompts.images
    encoded = processor(text=processor.image_token * prompts.images, images=[images], return_tensors="pt")
    typical = typical_length(model.pyramid)
    lengths = prompts.text_tokens or (typical[1] if typical else TEXT_TOKENS,)
    return synthetic_inputs(model, encoded, [lengths[i % len(lengths)] for i in range(batch_size)])


def _draw(
    data: DataOptions, batch_size: int, rounds: int, check: Callable[[Sample], None], reporter: Reporter
) -> list[Sample]:
    """Draw samples with an image, enough for all rounds of the largest batch size."""
    needed = batch_size * rounds
    read = load_data(data, split="heldout", limit=needed, check=check, reporter=reporter)
    samples = [sample for sample in read.samples if sample.images]
    if len(samples) < needed:
        raise DataError(
            f"--data {data.name} has {len(samples)} samples with an image, but {rounds} rounds of {batch_size} need "
            f"{needed}"
        )
    return samples[:needed]


def _in_batches(samples: Sequence[Sample], batch_size: int, rounds: int) -> list[Sequence[Sample]]:
    """Return other samples for every round; a smaller batch size takes its own from all over what was drawn."""
    needed = batch_size * rounds
    spread = samples[:: len(samples) // needed][:needed]
    return [spread[start : start + batch_size] for start in range(0, needed, batch_size)]
