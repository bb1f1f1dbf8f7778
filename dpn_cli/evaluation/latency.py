"""Latency of several ways to run one model, measured in turns in one process.

After a warm-up, every round runs every method once on the same prompts, in an order that moves on from round to
round: what else the machine does falls on all of them alike. What is reported as a speedup is the median, over the
rounds, of the original's time divided by the method's in the same round.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch

from dpn_cli.evaluation.baselines.baseline import Baseline, Prompt, full_flops
from dpn_cli.evaluation.baselines.routes import Original
from dpn_cli.evaluation.timing import Clock, Timing, attention_kernels, time_generation
from dpn_cli.modeling.state import visual_grids
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.experts import num_tokens

PHASES = ("vision", "prefill", "first_token", "decode")
CONFIDENCE = 0.95
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Phase:
    """One phase of a generation over all rounds, in seconds.

    Attributes:
        median_s: median over the rounds.
        low_s: Lower quartile, in seconds.
        high_s: Upper quartile, in seconds.
        speedup: the original's time over this one's, the median of the paired ratios.
        speedup_low: lower end of that median's distribution-free interval: of 95%, or in fewer than six rounds the
            whole range.
        speedup_high: upper end of that interval.
    """

    median_s: float
    low_s: float
    high_s: float
    speedup: float
    speedup_low: float
    speedup_high: float


@dataclass(frozen=True)
class Measurement:
    """One method over all rounds.

    Attributes:
        name: Name in tables.
        fraction: fraction of the original's prefill FLOPs that the samples need; padding does not count.
        flops: prefill FLOPs of the language model for one batch, the mean over the rounds.
        kv_bytes: bytes of the KV cache at the end of a batch, the mean over the rounds.
        peak_bytes: peak memory in bytes, the highest of all rounds; None if it cannot be known.
        kernels: fused attention kernels of the language model; none for plain matrix products.
        distortion: KL from the original's distribution of the first token, in nats; the mean over the samples.
        agreement: share of the samples whose most likely first token is the original's.
        phases: phases by their names in `PHASES`; `vision` only with images and `decode` only with several tokens.
    """

    name: str
    fraction: float
    flops: float
    kv_bytes: float
    peak_bytes: int | None
    kernels: tuple[str, ...]
    distortion: float
    agreement: float
    phases: dict[str, Phase]

    @property
    def ideal_speedup(self) -> float:
        """The speedup of prefill if time were FLOPs."""
        return 1 / self.fraction


@dataclass(frozen=True)
class Latency:
    """Methods, measured on the same prompts.

    Attributes:
        device: the device's name.
        dtype: dtype of the weights.
        attention: attention implementation in transformers, such as `sdpa`.
        threads: number of threads that torch uses on the CPU.
        batch_size: samples per batch.
        prompt_tokens: tokens of the longest prompt.
        new_tokens: number of tokens generated for every sample.
        rounds: number of timed rounds after the warm-up round.
        measurements: the methods' figures, the original's first.
    """

    device: str
    dtype: str
    attention: str
    threads: int
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    measurements: list[Measurement]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        rows = [{**asdict(each), "ideal_speedup": each.ideal_speedup} for each in self.measurements]
        return {**asdict(self), "measurements": rows}


@dataclass(frozen=True)
class _Run:
    timing: Timing
    logits: torch.Tensor
    fraction: float
    flops: float


def measure_latency(
    model: PyramidGenerationMixin,
    methods: Mapping[str, Baseline],
    batches: Sequence[Inputs],
    new_tokens: int,
    advance: Callable[[int], None] = lambda done: None,
    clock: Clock = time.perf_counter,
) -> Latency:
    """Measure all methods in turns, one round per batch.

    Args:
        model: the model, in eval mode.
        methods: Methods to measure, by name, `Original.name` among them.
        batches: batches of one size, as `generate` takes them, on any device.
        new_tokens: number of tokens to generate for every sample; no end-of-sequence token ends an answer early.
        advance: called with 1 after every generation, the warm-up among them.
        clock: returns seconds; `time.process_time` leaves out what other programs take of one CPU thread.
    """
    names = [Original.name, *(name for name in methods if name != Original.name)]
    kernels = {}
    for name in names:
        with methods[name].applied(model), attention_kernels(model) as kernels[name]:
            time_generation(model, batches[0], min(new_tokens, 2))
        advance(1)
    runs: dict[str, list[_Run]] = {name: [] for name in names}
    for i, inputs in enumerate(batches):
        prompts = prompts_of(model, inputs)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            runs[name].append(_run(model, methods[name], inputs, prompts, new_tokens, clock))
            advance(1)
    config = model.config.get_text_config()
    return Latency(
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU",
        dtype=str(model.dtype).removeprefix("torch."),
        attention=config._attn_implementation or "eager",
        threads=torch.get_num_threads(),
        batch_size=len(batches[0]["input_ids"]),
        prompt_tokens=max(batch["input_ids"].shape[1] for batch in batches),
        new_tokens=new_tokens,
        rounds=len(batches),
        measurements=[_summary(name, runs[name], runs[Original.name], sorted(kernels[name])) for name in names],
    )


def prompts_of(model: PyramidGenerationMixin, inputs: Inputs) -> list[Prompt]:
    """Return what the cost of every row of a batch depends on."""
    tokens = inputs["attention_mask"].sum(1).tolist()
    if "pixel_values" not in inputs:
        return [Prompt((), total) for total in tokens]
    grids = visual_grids(model.model.locate(inputs_embeds=None, **dict[str, Any](inputs)))
    return [Prompt(sample, total - num_tokens(sample)) for sample, total in zip(grids, tokens, strict=True)]


def synthetic_inputs(
    model: PyramidGenerationMixin, images: Inputs, text_tokens: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return a batch of prompts of wanted lengths, padded on the left: a word, the images, and the other words.

    Args:
        model: says which token stands for an image.
        images: the images of every sample, as the processor encodes them: `input_ids` with their placeholders, pixels
            and sizes.
        text_tokens: text tokens of each sample, at least two.
    """
    config, longest = model.config, max(text_tokens)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(config.get_text_config().vocab_size, (len(text_tokens), longest), generator=generator)
    words[words == config.image_token_id] = 0
    if model.pyramid.router.token_id is not None:
        words[:, -1] = model.pyramid.router.token_id
    places = images["input_ids"][images["input_ids"] == config.image_token_id]
    rows = [torch.cat([row[:1], places, row[1 - count :]]) for row, count in zip(words, text_tokens, strict=True)]
    gaps = [longest - count for count in text_tokens]
    pad = torch.nn.functional.pad
    batch = {
        "input_ids": torch.stack([pad(row, (gap, 0)) for row, gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.stack([pad(torch.ones_like(r), (g, 0)) for r, g in zip(rows, gaps, strict=True)]),
    }
    for name in images.keys() - batch.keys():
        batch[name] = torch.cat([images[name]] * len(text_tokens))
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the narrowest distribution-free interval of a median, by order statistics, that has 95% or more.

    Fewer than six values cannot have it; theirs is the whole range.

    Source: David and Nagaraja, Order Statistics, section 7.1: with k values dropped at each end, the others enclose
    the median unless at most k of all values lie on one side of it.
    """
    ordered, count = sorted(values), len(values)
    dropped, outside = 0, 2 / 2**count  # the chance that the median lies outside when so many are dropped at each end
    while (outside := outside + 2 * math.comb(count, dropped + 1) / 2**count) <= 1 - CONFIDENCE:
        dropped += 1
    return ordered[dropped], ordered[-1 - dropped]


def _run(
    model: PyramidGenerationMixin,
    method: Baseline,
    inputs: Inputs,
    prompts: Sequence[Prompt],
    new_tokens: int,
    clock: Clock,
) -> _Run:
    with method.applied(model):
        timing, logits = time_generation(model, inputs, new_tokens, clock)
        fractions = method.fractions(model, prompts)
    full = [full_flops(model.text_model.shape, prompt) for prompt in prompts]
    spent = sum(fraction * flops for fraction, flops in zip(fractions, full, strict=True))
    return _Run(timing, logits.float(), spent / sum(full), spent)


def _summary(name: str, runs: Sequence[_Run], originals: Sequence[_Run], kernels: Sequence[str]) -> Measurement:
    mine, theirs = (torch.cat([run.logits for run in each]).log_softmax(-1) for each in (runs, originals))
    distortion = (theirs.exp() * (theirs - mine)).sum(-1).mean()
    peaks = [run.timing.peak_bytes for run in runs]
    return Measurement(
        name=name,
        fraction=sum(run.flops for run in runs) / sum(run.flops for run in originals),
        flops=sum(run.flops for run in runs) / len(runs),
        kv_bytes=sum(run.timing.kv_bytes for run in runs) / len(runs),
        peak_bytes=max(peak for peak in peaks if peak is not None) if None not in peaks else None,
        kernels=tuple(kernels),
        distortion=distortion.item(),
        agreement=(mine.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        phases={
            phase: _phase([_seconds(r, phase) for r in runs], [_seconds(r, phase) for r in originals])
            for phase in PHASES
            if _seconds(originals[0], phase)
        },
    )


def _seconds(run: _Run, phase: str) -> float:
    return getattr(run.timing, f"{phase}_s") or 0.0


def _phase(seconds: Sequence[float], originals: Sequence[float]) -> Phase:
    ratios = [theirs / mine for mine, theirs in zip(seconds, originals, strict=True)]
    low, high = quantiles(seconds, n=4, method="inclusive")[::2] if len(seconds) > 1 else (seconds[0], seconds[0])
    return Phase(median(seconds), low, high, median(ratios), *median_interval(ratios))
