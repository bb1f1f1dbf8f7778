"""Does prefill get faster by as much as its FLOPs get fewer, and what does choosing tokens cost? LLaVA-1.5-7B's shape.

    python benchmarks/latency.py --layers 4
    python benchmarks/latency.py --device cuda --layers 32 --json latency.json

The decoder is built in memory with random weights and, on a CPU, with fewer layers, in float32; on CUDA in bfloat16.
The vision tower has two layers, as its time is not what is looked at. 1024 visual tokens are LLaVA-HR's; 2880 are five
images, as many as the tiles of LLaVA-NeXT. All methods are measured in turns (see `dpn bench`); what counts is the
paired speedup of the prefill, held against the one that its FLOPs promise:

- `dpn`: the routers run but do not decide, as random ones would decide nothing sensible; every sample is given the
  route that is nearest to the budget, and in the ragged batch others whose mean is about the budget.
- `static`: the same route for all samples, without routers.
- Baselines that can spend what the static route spends, and do.

One more table is of the choice alone: what an expert takes to choose and compact the tokens before the first layer,
beside the prefill of 32 layers, which is extrapolated from the measured time of a layer. The last is of matrix products
alone: on fewer tokens they are slower by themselves, whatever the method, as weights have to be read all the same.

On a machine with other work, `--shared` takes the CPU time of one thread for the clock. With `--compile`, all methods
run compiled by `torch.compile` as well, beside the original that is not.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from dpn_cli import console
from dpn_cli.commands.tables.latency import print_latency
from dpn_cli.evaluation.baselines import make_baseline
from dpn_cli.evaluation.baselines.baseline import Baseline, Prompt
from dpn_cli.evaluation.baselines.routes import FixedRoute, GivenRoutes, Original, Routed
from dpn_cli.evaluation.drawing import plot_latency
from dpn_cli.evaluation.latency import Inputs, Latency, measure_latency, synthetic_inputs
from dpn_cli.evaluation.timing import Clock, done_at, time_generation
from dpn_cli.modeling.configuration import DpnLlavaConfig
from dpn_cli.modeling.llava import DpnLlavaForConditionalGeneration
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import PyramidConfig, Route, RouterConfig, Site
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.experts import KEEP, Expert, Grid, num_tokens
from dpn_cli.pyramid.shape import DecoderShape

MENUS = {  # by the depth of the site
    0.0: "keep guided:0.25 "
    "diverse:0.6 diverse:0.5 diverse:0.4 diverse:0.3 diverse:0.25 diverse:0.2 diverse:0.15 diverse:0.1",
    0.5: "keep attended:0.5",
    0.75: "keep exit",
}
ROUTER = RouterConfig(input="instruction")  # as in the recipes
CHOICES = ("pool:2x2", "guided:0.25", "diverse:0.25", "covering:0.25", "attended:0.25", "divprune:0.25")
PATCH = 14
IMAGE_TOKEN = 32000
LAYERS = 32  # of the 7B model
SPREAD = (-0.06, -0.02, 0.02, 0.06)  # of the routes' FLOPs fractions in a ragged batch, around the budget


@dataclass(frozen=True)
class Case:
    """A batch to measure.

    Attributes:
        images: number of images per sample.
        text_tokens: text tokens of every sample.
        side: Rows, and columns, of visual tokens of an image.
    """

    images: int
    text_tokens: tuple[int, ...]
    side: int = 24

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The visual grids of a sample."""
        return ((self.side, self.side),) * self.images


CASES = {
    "576": Case(1, (64,)),
    "576-ragged": Case(1, (32, 64, 96, 128)),
    "576-ragged-8": Case(1, (32, 64, 96, 128) * 2),
    "576-batch": Case(1, (64,) * 8),
    "1024": Case(1, (64,), side=32),
    "2880": Case(5, (64,)),
}


@lru_cache(maxsize=1)
def random_llava(layers: int, device: str, dtype: torch.dtype, side: int) -> DpnLlavaForConditionalGeneration:
    """Return LLaVA-1.5-7B with other numbers of layers, random weights and a pyramid, for images of `side`² tokens."""
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16,
        image_size=side * PATCH, patch_size=PATCH, projection_dim=768,
    )  # fmt: skip
    config = DpnLlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, dtype=dtype)
    menus = {round(depth * layers) - 1: tuple(map(Expert.parse, menu.split())) for depth, menu in MENUS.items()}
    sites = tuple(Site(layer, menu) for layer, menu in menus.items())
    config.pyramid = PyramidConfig(sites=sites, router=ROUTER).to_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return DpnLlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def routes_near(shape: DecoderShape, pyramid: PyramidConfig, case: Case, budget: float) -> list[Route]:
    """Return a route for every sample, whose FLOPs fractions lie around a budget."""
    count = len(case.text_tokens)
    targets = [budget] if count == 1 else [budget + offset for _, offset in zip(range(count), cycle(SPREAD))]
    return [
        min(
            pyramid.routes_for(case.grids),
            key=lambda route: abs(flops_fraction(shape, pyramid, route, case.grids, count) - target),
        )
        for count, target in zip(case.text_tokens, targets, strict=True)
    ]


def methods_at(
    model: DpnLlavaForConditionalGeneration, case: Case, budget: float, against: Sequence[str]
) -> Iterator[tuple[str, Baseline]]:
    """Yield the pyramid, a static route, and the baselines that can spend as little."""
    shape, pyramid = model.text_model.shape, model.pyramid
    yield f"{Routed.name} at {budget:g}", GivenRoutes(given=tuple(routes_near(shape, pyramid, case, budget)))
    alone = Case(case.images, (round(fmean(case.text_tokens)),))
    static = FixedRoute(pyramid, routes_near(shape, pyramid, alone, budget)[0])
    prompts = [Prompt(case.grids, count) for count in case.text_tokens]
    spent = static.mean_fraction(shape, prompts)
    console.note(f"static at {budget:g}: {static.experts} spends {spent:.3f}")
    yield f"static at {budget:g}", static
    for name in against:
        with suppress(ValueError):
            yield f"{name} at {budget:g}", make_baseline(name, pyramid).fit(shape, prompts, spent)


def measure(
    model: DpnLlavaForConditionalGeneration,
    name: str,
    budgets: Sequence[float],
    against: Sequence[str],
    rounds: int,
    new_tokens: int,
    clock: Clock,
    compiles: bool,
) -> Latency:
    """Measure all methods on one batch, if asked also compiled."""
    case = CASES[name]
    images = {"input_ids": torch.full((1, num_tokens(case.grids)), IMAGE_TOKEN)}
    images["pixel_values"] = torch.randn(case.images, 3, *[case.side * PATCH] * 2, dtype=model.dtype)
    batch = synthetic_inputs(model, images, case.text_tokens)
    methods: dict[str, Baseline] = {Original.name: Original()}
    for budget in budgets:
        methods |= dict(methods_at(model, case, budget, against))
    if compiles:
        methods |= compiled(model, methods, batch, new_tokens)
    with torch.compiler.set_stance("force_eager"), console.progress(name, (rounds + 1) * len(methods)) as advance:
        return measure_latency(model, methods, [batch] * rounds, new_tokens, advance=advance, clock=clock)


def compiled(
    model: DpnLlavaForConditionalGeneration, methods: dict[str, Baseline], batch: Inputs, new_tokens: int
) -> dict[str, Baseline]:
    """Have a model compiled, but run so by none but the methods that are returned: the given ones once more."""
    model.compile(dynamic=True)
    again = {f"{name}, compiled": _compiled(method) for name, method in methods.items()}
    for name, method in again.items():
        with console.waiting(name), method.applied(model):
            time_generation(model, batch, new_tokens)
    return again


def _compiled(method: Baseline) -> Baseline:
    """Return a method that runs what is compiled, whatever the stance is."""
    kind: Any = type(method)

    class Compiled(kind):
        @contextmanager
        def applied(self, model: PyramidGenerationMixin) -> Iterator[None]:
            with super().applied(model), torch.compiler.set_stance("default"):
                yield

    return Compiled(**vars(method))


@dataclass(frozen=True)
class Choice:
    """What choosing tokens before the first layer takes.

    Attributes:
        tokens: number of visual tokens.
        expert: the expert that chooses.
        choice_s: seconds to choose and compact, the median of the rounds.
        layer_s: seconds that a layer takes on all tokens, the median of the rounds.
    """

    tokens: int
    expert: str
    choice_s: float
    layer_s: float

    @property
    def share(self) -> float:
        """The share of the prefill of all layers, extrapolated from one."""
        return self.choice_s / (LAYERS * self.layer_s)


@torch.inference_mode()
def measure_choices(model: DpnLlavaForConditionalGeneration, case: Case, rounds: int, clock: Clock) -> Iterator[Choice]:
    """Measure the experts of `CHOICES` on one sample, and the layers without any."""
    text_model, device = model.text_model, model.device
    grid = torch.cartesian_prod(torch.arange(case.images), torch.arange(case.side), torch.arange(case.side))
    coords = torch.cat([grid, torch.full((case.text_tokens[0], 3), -1)])[None].to(device)
    width = text_model.config.hidden_size
    embedded = torch.randn(1, coords.shape[1], width, dtype=model.dtype, device=device)
    positions = torch.arange(coords.shape[1], device=device)[None]
    seconds, layer_s = partial(median_seconds, device, rounds, clock), 0.0
    for name in CHOICES:
        site = Site(-1, (KEEP, Expert.parse(name)))
        with model.as_pyramid(PyramidConfig(sites=(site,), static_route=(1,))):
            state = text_model.start(embedded, None, positions, coords)
            layer_s = layer_s or seconds(text_model.run_segment, state, 1) / len(text_model.layers)
            choice_s = seconds(text_model.reduce, state, 0)
        yield Choice(num_tokens(case.grids), name, choice_s, layer_s)


def median_seconds(device: torch.device, rounds: int, clock: Clock, action: Callable[..., Any], *args: Any) -> float:
    """Return what an action takes, the median of some rounds after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        start = done_at(device, clock)
        action(*args)
        times.append(done_at(device, clock) - start)
    return median(times[1:])


@dataclass(frozen=True)
class Product:
    """How fast the matrix products of a layer are.

    Attributes:
        budget: share of the tokens of a sample.
        tokens: their number.
        flops_per_s: FLOPs per second.
    """

    budget: float
    tokens: int
    flops_per_s: float


@torch.inference_mode()
def measure_products(
    model: DpnLlavaForConditionalGeneration, case: Case, budgets: Sequence[float], rounds: int, clock: Clock
) -> Iterator[Product]:
    """Measure the matrix products of a layer's MLP on all tokens of one sample, and on as many as budgets leave."""
    mlp, all_tokens = model.text_model.layers[0].mlp, num_tokens(case.grids) + case.text_tokens[0]
    for budget in (1.0, *budgets):
        tokens = round(budget * all_tokens)
        states = torch.randn(1, tokens, model.text_model.config.hidden_size, dtype=model.dtype, device=model.device)
        flops = 2 * tokens * sum(weight.numel() for weight in mlp.parameters())
        yield Product(budget, tokens, flops / median_seconds(model.device, rounds, clock, mlp, states))


def print_efficiencies(results: dict[str, Latency]) -> None:
    """Print how much of the speedup that FLOPs promise the prefill reaches, of every method on every batch."""
    rows = []
    for name, result in results.items():
        for each in result.measurements[1:]:
            prefill = each.phases["prefill"]
            speeds = (prefill.speedup, prefill.speedup_low, prefill.speedup_high)
            reached, low, high = (f"{speed / each.ideal_speedup:.0%}" for speed in speeds)
            speedups = (f"{prefill.speedup:.2f}", f"{each.ideal_speedup:.2f}")
            rows.append((name, each.name, f"{each.fraction:.3f}", *speedups, reached, f"{low} – {high}"))
    columns = ["batch", "method", "FLOPs", "speedup", "ideal speedup", "efficiency", "95% interval"]
    console.table("Speedup of the prefill, the ideal one by FLOPs, and efficiency", columns, rows, texts=["method"])


def print_choices(choices: Sequence[Choice]) -> None:
    """Print what choosing tokens takes."""
    rows = [
        (each.tokens, each.expert, f"{each.choice_s * 1e3:.2f}", f"{each.layer_s * 1e3:.2f}", f"{each.share:.2%}")
        for each in choices
    ]
    columns = ["visual tokens", "expert", "choice, ms", "a layer, ms", f"share of {LAYERS} layers (extrapolated)"]
    console.table("Choosing tokens before the first layer", columns, rows, texts=["expert"])


def print_products(products: dict[str, list[Product]]) -> None:
    """Print how fast matrix products are, on all tokens and on those that are left."""
    rows = [
        (name, f"{each.budget:g}", each.tokens, f"{each.flops_per_s / 1e9:.1f}", f"{each.flops_per_s / whole:.0%}")
        for name, found in products.items()
        for whole in [found[0].flops_per_s]
        for each in found
    ]
    columns = ["batch", "tokens left", "tokens", "GFLOP/s", "of the rate on all"]
    console.table("Matrix products of a layer, on as many tokens as a budget leaves", columns, rows)


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--layers", type=click.IntRange(4), default=4, show_default=True, help="Decoder layers, 32 in the model.")
@click.option("--rounds", default=6, show_default=True)
@click.option("--new-tokens", default=2, show_default=True, help="Tokens to generate; all but one tell of decoding.")
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, default=list(CASES), show_default=True)
@click.option("--budget", "budgets", type=float, multiple=True, default=(0.44, 0.25, 0.15), show_default=True)
@click.option("--against", multiple=True, default=("pyramiddrop", "divprune"), show_default=True)
@click.option("--shared", is_flag=True, help="Count the CPU seconds of one thread: other programs run here, too.")
@click.option("--compile", "compiles", is_flag=True, help="Run all methods compiled, too.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw them, .png or .svg.")
def main(
    device: str,
    layers: int,
    rounds: int,
    new_tokens: int,
    cases: tuple[str, ...],
    budgets: tuple[float, ...],
    against: tuple[str, ...],
    shared: bool,
    compiles: bool,
    path: Path | None,
    plot: Path | None,
) -> None:
    """Measure whole prefills, then the choice of tokens alone."""
    torch.manual_seed(0)
    if shared:
        torch.set_num_threads(1)
    clock = time.process_time if shared else time.perf_counter
    dtype, results, choices, products = torch.bfloat16 if device == "cuda" else torch.float32, {}, [], {}
    console.note(f"{layers} decoder layers of LLaVA-1.5-7B, random weights, {dtype} on {device}")
    for name in sorted(cases, key=lambda name: CASES[name].side):
        model, case = random_llava(layers, device, dtype, CASES[name].side), CASES[name]
        results[name] = measure(model, name, budgets, against, rounds, new_tokens, clock, compiles)
        if len(case.text_tokens) == 1:
            choices += measure_choices(model, case, rounds, clock)
            products[name] = list(measure_products(model, case, budgets, rounds, clock))
    for result in results.values():
        print_latency(result, has_data=False)
    print_efficiencies(results)
    print_choices(choices)
    print_products(products)
    if path is not None:
        found = {
            "latency": {name: result.to_dict() for name, result in results.items()},
            "choices": [asdict(each) | {"share_of_prefill": each.share} for each in choices],
            "products": {name: list(map(asdict, found)) for name, found in products.items()},
        }
        path.write_text(json.dumps(found, indent=2), encoding="utf-8")
    if plot is not None:
        plot_latency(plot, list(results.values()), has_data=False)


if __name__ == "__main__":
    main()
