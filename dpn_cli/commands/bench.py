"""`dpn bench`: latency, memory and FLOPs beside the original and what else there is, in one run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpn_cli import console
from dpn_cli.commands.options import Fraction, Size, checkpoint_folder, contender_names, model_option
from dpn_cli.errors import DataError, UsageError
from dpn_cli.evaluation.contenders import CONTENDERS

if TYPE_CHECKING:
    from dpn_cli.evaluation.contenders.contender import Contender, Prompt
    from dpn_cli.evaluation.latency import Inputs
    from dpn_cli.modeling.wrapper import PyramidGenerationMixin


TEXT_TOKENS = 64


class TextTokens(click.ParamType[tuple[int, ...]]):
    """One number of tokens, or several with commas between them."""

    name = "tokens"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers, or fail."""
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 2:
            self.fail(f"{value!r} is none: expected numbers of 2 or more, such as 64 or 32,64,128", param, ctx)
        return numbers


@click.command("bench")
@model_option
@click.option("--budget", "budgets", type=Fraction(), multiple=True, help="Mean fraction of prefill FLOPs; repeatable.")
@click.option(
    "--route",
    "routes",
    multiple=True,
    help="The same rates for all samples, such as 1x1,1x2,2x2 (or 0,1,2); repeatable.",
)
@click.option(
    "--against", metavar="NAME,NAME,…", default="",
    help=f"Other methods, at the FLOPs of every --budget: {', '.join(CONTENDERS[1:])}, or all.",
)  # fmt: skip
@click.option("--batch-size", "batch_sizes", type=click.IntRange(1), multiple=True, default=(1,), show_default=True)
@click.option("--images", type=click.IntRange(1), help="Of a synthetic sample; default: 1.")
@click.option(
    "--image-size", type=Size(),
    help="Their height and width, for models that cut images into tiles; default: 672x672.",
)  # fmt: skip
@click.option(
    "--text-tokens", type=TextTokens(), metavar="N[,N…]", help="Of a batch's synthetic samples, in turn; default: 64."
)
@click.option("--data", help="Take prompts from here, as in `dpn calibrate`, in place of synthetic ones.")
@click.option("--image-root", type=click.Path(path_type=Path, file_okay=False), help="Where its image paths start.")
@click.option("--new-tokens", type=click.IntRange(1), default=16, show_default=True, help="To generate per sample.")
@click.option("--rounds", type=click.IntRange(1), default=8, show_default=True, help="Behind a warm-up.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw a picture, .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: Path | None,
    budgets: tuple[float, ...],
    routes: tuple[str, ...],
    against: str,
    batch_sizes: tuple[int, ...],
    images: int | None,
    image_size: tuple[int, int] | None,
    text_tokens: tuple[int, ...] | None,
    data: str | None,
    image_root: Path | None,
    new_tokens: int,
    rounds: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure time to the first token, decoding, memory and FLOPs beside the original's, in turns in one process.

    Without --budget and --route the checkpoint runs as it is. Synthetic prompts are noise: what routers make of them
    says nothing about your data, for that give --data.
    """
    names = contender_names(against)
    if names and not budgets:
        raise UsageError("--against compares at equal FLOPs: say at which, with --budget")
    if data is not None and (images or image_size or text_tokens):
        raise UsageError("--data brings its own prompts: leave out --images, --image-size and --text-tokens")
    if plot is not None:
        from dpn_cli.evaluation.plots import check_plot

        check_plot(plot)
    folder = checkpoint_folder(model)

    from dpn_cli.checkpoint.layout import IMAGE_SIZE, open_converted
    from dpn_cli.commands.tables import print_latency
    from dpn_cli.evaluation.latency import measure_latency, prompts_of
    from dpn_cli.modeling.loading import default_device, load_model, load_processor
    from dpn_cli.route import parse_route

    experts = [parse_route(route, open_converted(folder)[2].sites) for route in routes]
    processor = load_processor(folder)
    loaded = load_model(folder, device_map=default_device())
    results = []
    for batch_size in batch_sizes:
        if data is None:
            lengths = text_tokens or (TEXT_TOKENS,)
            size = image_size or IMAGE_SIZE
            batches = _synthetic(loaded, processor, images or 1, size, lengths, batch_size, rounds)
        else:
            batches = _from_data(loaded, processor, data, image_root, batch_size, rounds)
        prompts = [prompt for batch in batches for prompt in prompts_of(loaded, batch)]
        contenders = _contenders(loaded, prompts, budgets, experts, names)
        with console.progress(f"batch of {batch_size}", (rounds + 1) * len(contenders)) as advance:
            results.append(measure_latency(loaded, contenders, batches, new_tokens, advance))
    if as_json:
        rows = [result.to_dict() for result in results]
        click.echo(json.dumps({"checkpoint": str(folder), "runs": rows}, indent=2, ensure_ascii=False))
    else:
        for result in results:
            print_latency(result, data is not None)
    if plot is not None:
        from dpn_cli.evaluation.pictures import plot_latency

        plot_latency(plot, results, has_data=data is not None)
        console.note(f"Picture: {plot}")


def _synthetic(
    model: "PyramidGenerationMixin",
    processor: Any,
    images: int,
    image_size: tuple[int, int],
    text_tokens: Sequence[int],
    batch_size: int,
    rounds: int,
) -> "list[Inputs]":
    """Return the same batch for every round: images of noise and random words."""
    import numpy as np
    from PIL import Image

    from dpn_cli.evaluation.latency import synthetic_inputs

    noise = np.random.default_rng(0).integers(0, 255, (*image_size, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise)] * images
    encoded = processor(
        text=processor.image_token * images, images=[pictures] if pictures else None, return_tensors="pt"
    )
    lengths = [text_tokens[i % len(text_tokens)] for i in range(batch_size)]
    return [synthetic_inputs(model, encoded, lengths)] * rounds


def _from_data(
    model: "PyramidGenerationMixin",
    processor: Any,
    data: str,
    image_root: Path | None,
    batch_size: int,
    rounds: int,
) -> "list[Inputs]":
    """Return a batch of other samples for every round."""
    from dpn_cli.calibration.data import load_data
    from dpn_cli.calibration.encoding import prompts

    samples = load_data(data, image_root, split="heldout", limit=batch_size * rounds).samples
    if len(samples) < batch_size * rounds:
        raise DataError(
            f"--data {data} has {len(samples)} samples, {rounds} rounds of {batch_size} need {batch_size * rounds}"
        )
    parts = [samples[start : start + batch_size] for start in range(0, batch_size * rounds, batch_size)]
    return [prompts(part, processor, model.device) for part in parts]


def _contenders(
    model: "PyramidGenerationMixin",
    prompts: "Sequence[Prompt]",
    budgets: Sequence[float],
    routes: Sequence[tuple[int, ...]],
    against: Sequence[str],
) -> "dict[str, Contender]":
    """Return what is to be measured, by the names that tables use.

    Raises:
        UsageError: if a budget or a route is not to be had.
    """
    from dpn_cli.evaluation.contenders.routes import FixedRoute, Original, Routed
    from dpn_cli.evaluation.latency import ORIGINAL

    pyramid = model.pyramid
    contenders: dict[str, Contender] = {ORIGINAL: Original()}
    if not budgets and not routes:
        contenders["dpn"] = Routed()
    try:
        for budget in budgets:
            pyramid.trade_off_for(budget)
            contenders[f"dpn at {budget:g}"] = Routed(budget)
            contenders |= _rivals(model, prompts, budget, [name for name in against if name != ORIGINAL])
        for route in routes:
            for prompt in prompts:
                pyramid.walk(route, prompt.grids)
            fixed = FixedRoute(pyramid, route)
            contenders[fixed.label] = fixed
    except ValueError as error:
        raise UsageError(str(error)) from None
    return contenders


def _rivals(
    model: "PyramidGenerationMixin", prompts: "Sequence[Prompt]", budget: float, names: Sequence[str]
) -> "dict[str, Contender]":
    """Return other methods at a budget; say which cannot spend so little, or cannot handle such a model."""
    from dpn_cli.evaluation.contenders import make_contender

    found: dict[str, Contender] = {}
    for name in names:
        try:
            contender = make_contender(name, model.pyramid).fit(model.model.language_model.shape, prompts, budget)
            with contender.applied(model):
                found[f"{contender.label} at {budget:g}"] = contender
        except (ValueError, UsageError) as error:
            console.note(f"Left out, {name} at {budget:g}: {error}")
    return found
