"""Does prefill get faster by as much as its FLOPs get fewer? At the shape of LLaVA-1.5-7B, with random weights.

    python benchmarks/latency.py --layers 8

The decoder is built in memory, in the dtype in which this CPU multiplies faster and with fewer layers; sites stand at
the same fractions of the depth (a quarter, a half, three quarters) as in the recipe. Its routers run but do not decide:
random ones would decide nothing sensible. Routes are those nearest to a budget and, in the ragged batch, others for
every sample whose mean is about the budget; rates go up to 4×4, without which such a pyramid cannot spend 0.35. FastV
and PyramidDrop spend what these routes spend. All are measured in turns (see `dpn bench`); what counts is the paired
speedup of the prefill, to be held against the one that its FLOPs promise. On a machine with other work, `--shared`
takes the CPU time of one thread for the clock.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import click
import torch
from dpn_cli.evaluation.baselines.fastv import FastV
from dpn_cli.evaluation.baselines.pyramid_drop import PyramidDrop
from transformers import CLIPVisionConfig, LlamaConfig

from dpn_cli import console
from dpn_cli.commands.tables import print_latency
from dpn_cli.evaluation.baselines.baseline import Baseline, Prompt
from dpn_cli.evaluation.baselines.routes import GivenRoutes, Original
from dpn_cli.evaluation.drawing import plot_latency
from dpn_cli.evaluation.latency import ORIGINAL, Latency, measure_latency, synthetic_inputs
from dpn_cli.modeling.configuration import DpnLlavaConfig
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration
from dpn_cli.pyramid.config import PyramidConfig, Route, Site
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.experts import num_tokens, pool
from dpn_cli.pyramid.shape import DecoderShape

DEPTHS = (0.25, 0.5, 0.75)
RATES = ((1, 1), (1, 2), (2, 2), (4, 4))
GRID = (24, 24)
IMAGE_TOKEN = 32000
TEXT_TOKENS = {1: (64,), 4: (32, 64, 96, 128)}  # by batch size; the second is ragged
SPREAD = (-0.09, -0.03, 0.03, 0.09)  # of the routes' FLOPs fractions in a ragged batch, around the budget


def faster_dtype() -> torch.dtype:
    """Return in which dtype this machine multiplies an MLP's matrices faster."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(640, 4096, dtype=dtype), torch.randn(11008, 4096, dtype=dtype)
        torch.nn.functional.linear(x, weight)
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


def random_llava(layers: int, dtype: torch.dtype) -> DpnLlavaForConditionalGeneration:
    """Return LLaVA-1.5-7B with fewer decoder layers, random weights and a pyramid."""
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    config = DpnLlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, dtype=dtype)
    sites = tuple(Site(round(depth * layers) - 1, pool(*RATES)) for depth in DEPTHS)
    config.pyramid = PyramidConfig(sites=sites).to_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return DpnLlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def routes_near(shape: DecoderShape, pyramid: PyramidConfig, text_tokens: Sequence[int], budget: float) -> list[Route]:
    """Return a route for every sample, whose FLOPs fractions lie around a budget."""
    targets = [budget] if len(text_tokens) == 1 else [budget + offset for offset in SPREAD]
    fractions = [
        {route: flops_fraction(shape, pyramid, route, [GRID], count) for route in pyramid.routes([GRID])}
        for count in text_tokens
    ]
    return [
        min(costs, key=lambda route: abs(costs[route] - target))
        for costs, target in zip(fractions, targets, strict=True)
    ]


def measure(
    model: DpnLlavaForConditionalGeneration,
    batch_size: int,
    budgets: Sequence[float],
    rounds: int,
    clock: Callable[[], float],
) -> Latency:
    """Measure all methods on one batch."""
    text_tokens = TEXT_TOKENS[batch_size]
    images = {"input_ids": torch.full((1, num_tokens([GRID])), IMAGE_TOKEN)}
    images["pixel_values"] = torch.randn(1, 3, 336, 336, dtype=model.dtype)
    batch = synthetic_inputs(model, images, text_tokens)
    shape, pyramid = model.text_model.shape, model.pyramid
    prompts = [Prompt((GRID,), count) for count in text_tokens]
    sites = tuple(site.after_layer for site in pyramid.sites)
    baselines: dict[str, Baseline] = {ORIGINAL: Original()}
    for budget in budgets:
        routes = tuple(routes_near(shape, pyramid, text_tokens, budget))
        spent = fmean(flops_fraction(shape, pyramid, r, [GRID], n) for r, n in zip(routes, text_tokens, strict=True))
        baselines[f"dpn at {budget:g}"] = GivenRoutes(given=routes)
        console.note(f"batch of {batch_size}, dpn at {budget:g}: routes {' '.join(map(str, routes))} spend {spent:.3f}")
        baselines[f"fastv at {budget:g}"] = FastV(first_layers=1).fit(shape, prompts, spent)
        baselines[f"pyramiddrop at {budget:g}"] = PyramidDrop(sites=sites).fit(shape, prompts, spent)
    with console.progress(f"batch of {batch_size}", (rounds + 1) * len(baselines)) as advance:
        return measure_latency(model, baselines, [batch] * rounds, new_tokens=4, advance=advance, clock=clock)


@click.command()
@click.option("--layers", default=8, show_default=True, help="Decoder layers; the 7B model has 32.")
@click.option("--rounds", default=6, show_default=True)
@click.option("--batch-size", "batch_sizes", type=click.Choice(["1", "4"]), multiple=True, default=("1", "4"))
@click.option("--budget", "budgets", type=float, multiple=True, default=(0.44, 0.35), show_default=True)
@click.option("--shared", is_flag=True, help="Count the CPU seconds of one thread: other programs run here, too.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw them, .png or .svg.")
def main(
    layers: int,
    rounds: int,
    batch_sizes: tuple[str, ...],
    budgets: tuple[float, ...],
    shared: bool,
    path: Path | None,
    plot: Path | None,
) -> None:
    """Measure a batch of one, and a ragged batch of four with a route of its own for every sample."""
    torch.manual_seed(0)
    if shared:
        torch.set_num_threads(1)
    clock = time.process_time if shared else time.perf_counter
    dtype = faster_dtype()
    console.note(f"{layers} decoder layers of LLaVA-1.5-7B, random weights, {dtype}")
    model = random_llava(layers, dtype)
    results = [measure(model, int(size), budgets, rounds, clock) for size in batch_sizes]
    for result in results:
        print_latency(result, has_data=False)
    if path is not None:
        path.write_text(json.dumps([result.to_dict() for result in results], indent=2))
    if plot is not None:
        plot_latency(plot, results, has_data=False)


if __name__ == "__main__":
    main()
