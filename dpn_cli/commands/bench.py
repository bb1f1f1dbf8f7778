"""`dpn bench`: latency, memory and FLOPs beside the original and what else there is, in one run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpn_cli import console
from dpn_cli.checkpoint.layout import TEXT_TOKENS
from dpn_cli.commands.options import (
    Fraction,
    Size,
    checkpoint_folder,
    contender_names,
    ignore_fields_option,
    model_option,
    validate_budgets,
)
from dpn_cli.errors import DataError, UsageError
from dpn_cli.evaluation.contenders import CONTENDERS

if TYPE_CHECKING:
    from dpn_cli.evaluation.latency import Inputs
    from dpn_cli.modeling.wrapper import PyramidGenerationMixin


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
    help=f"Other methods, at what dpn spends for every --budget: {', '.join(list(CONTENDERS)[1:])}, or all.",
)  # fmt: skip
@click.option("--batch-size", "batch_sizes", type=click.IntRange(1), multiple=True, default=(1,), show_default=True)
@click.option("--images", type=click.IntRange(1), help="Of a synthetic sample; default: 1.")
@click.option(
    "--image-size", type=Size(),
    help="Their height and width, for models that cut images into tiles; default: 672x672.",
)  # fmt: skip
@click.option(
    "--text-tokens", type=TextTokens(), metavar="N[,N…]",
    help=f"Of a batch's synthetic samples, in turn; default: as in the calibration data, else {TEXT_TOKENS}.",
)  # fmt: skip
@click.option("--data", help="Take prompts from here, as in `dpn calibrate`, in place of synthetic ones.")
@click.option("--image-root", type=click.Path(path_type=Path, file_okay=False), help="Where its image paths start.")
@ignore_fields_option
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
    ignored: tuple[str, ...],
    new_tokens: int,
    rounds: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure time to the first token, decoding, memory and FLOPs beside the original's, in turns in one process.

    Without --budget and --route the checkpoint runs as it is set. Synthetic prompts are noise to the routers: they
    run, but routes that spend the budget are given. With --data they choose, and others get what they spend.
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
    from dpn_cli.evaluation.latency import measure_latency
    from dpn_cli.evaluation.lineup import line_up
    from dpn_cli.evaluation.spending import unmet
    from dpn_cli.inference.loading import default_device, load_model, load_processor
    from dpn_cli.pyramid.reach import typical_length
    from dpn_cli.pyramid.route import parse_route

    pyramid = open_converted(folder)[2]
    experts = [parse_route(route, pyramid.sites) for route in routes]
    validate_budgets(pyramid, budgets)
    typical = typical_length(pyramid)
    processor = load_processor(folder)
    loaded = load_model(folder, device_map=default_device())
    results, lineups = [], []
    for batch_size in batch_sizes:
        if data is None:
            lengths = text_tokens or (TEXT_TOKENS if typical is None else typical[1],)
            size = image_size or IMAGE_SIZE
            batches = _synthetic(loaded, processor, images or 1, size, lengths, batch_size, rounds)
        else:
            batches = _from_data(loaded, processor, data, image_root, ignored, batch_size, rounds)
        found = line_up(loaded, batches, budgets, experts, names, has_data=data is not None)
        for remark in found.remarks:
            console.note(remark)
        with console.progress(f"batch of {batch_size}", (rounds + 1) * len(found.contenders)) as advance:
            results.append(measure_latency(loaded, found.contenders, batches, new_tokens, advance))
        lineups.append(found)
        for line in unmet(found.spendings, pyramid, folder, data, image_root) if data is not None else ():
            console.note(line)
    if as_json:
        rows = [
            result.to_dict() | {"budgets": [each.to_dict() for each in found.spendings], "remarks": found.remarks}
            for result, found in zip(results, lineups, strict=True)
        ]
        console.echo(json.dumps({"checkpoint": str(folder), "runs": rows}, indent=2, ensure_ascii=False))
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
    ignored: Sequence[str],
    batch_size: int,
    rounds: int,
) -> "list[Inputs]":
    """Return a batch of other samples for every round."""
    from dpn_cli.data.encoding import prompts
    from dpn_cli.data.loading import load_data

    dataset = load_data(data, image_root, split="heldout", limit=batch_size * rounds, ignored=ignored)
    samples = [sample for sample in dataset.samples if sample.images]
    if len(samples) < batch_size * rounds:
        raise DataError(
            f"--data {data} has {len(samples)} samples with an image, {rounds} rounds of {batch_size} need "
            f"{batch_size * rounds}"
        )
    parts = [samples[start : start + batch_size] for start in range(0, batch_size * rounds, batch_size)]
    return [prompts(part, processor, model.device) for part in parts]
