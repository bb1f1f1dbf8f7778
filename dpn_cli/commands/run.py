"""`dpn run`: answer a question about images and show the route."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpn_cli import console
from dpn_cli.commands.data_options import allow_urls_option
from dpn_cli.commands.numbers import Fraction, WholeNumber
from dpn_cli.commands.options import checkpoint_folder, dtype_option, model_option
from dpn_cli.errors import UsageError

if TYPE_CHECKING:
    from dpn_cli.data.samples import Sample
    from dpn_cli.inference.answering import Answer
    from dpn_cli.modeling.wrapper import PyramidGenerationMixin

SHOWN = 40  # characters of an image that is no file


@click.command("run")
@click.argument("question")
@click.option(
    "--image", "images", type=click.Path(), metavar="FILE", multiple=True, required=True,
    help="An image that the question is about: a file, a file: or data: URI or, with --allow-urls, a URL; repeatable.",
)  # fmt: skip
@allow_urls_option
@model_option
@click.option("--budget", type=Fraction(), help="Mean fraction of prefill FLOPs to spend; default: the checkpoint's.")
@click.option(
    "--route", metavar="ROUTE",
    help="Take this route instead of the routers' choice: one expert per site, such as keep,keep,2x2,keep,exit.",
)  # fmt: skip
@click.option(
    "--max-new-tokens",
    type=WholeNumber(1),
    default=256,
    show_default=True,
    help="Maximum number of tokens in the answer.",
)
@dtype_option("auto")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the streamed answer.")
def command(
    question: str,
    images: tuple[str, ...],
    allow_urls: bool,
    model: Path | None,
    budget: float | None,
    route: str | None,
    max_new_tokens: int,
    dtype: str,
    as_json: bool,
) -> None:
    """Answer QUESTION about one or more images, with greedy decoding.

    The answer goes to stdout as it is generated; its route, tokens, FLOPs and time go to stderr.
    """
    if budget is not None and route is not None:
        raise UsageError("--budget lets the routers choose, --route overrides them: give one of the two")
    question = question.replace("<image>", "").strip()  # the chat template says where the images go
    if not question:
        raise UsageError("the question is empty")
    folder = checkpoint_folder(model)

    sample = _sample(question, images, allow_urls)

    with console.waiting("starting"):
        from dpn_cli.checkpoint.fitted import validate_predictors
        from dpn_cli.checkpoint.layout import open_converted
        from dpn_cli.checkpoint.locks import in_use
        from dpn_cli.data.encoding import token_limit
        from dpn_cli.evaluation.spending import Spending, unmet
        from dpn_cli.inference.answering import answer
        from dpn_cli.inference.dtypes import compute_dtype
        from dpn_cli.inference.loading import default_device, load_opened, load_opened_processor, max_positions
        from dpn_cli.pyramid.reach import validate_in_table
        from dpn_cli.pyramid.route import parse_route

    with in_use(folder):
        checkpoint, layout, pyramid = open_converted(folder)
        experts = None if route is None else parse_route(route, pyramid.sites)
        validate_predictors(checkpoint, layout, pyramid, [] if experts is None else pyramid.experts(experts))
        validate_in_table([] if budget is None else [budget], pyramid)
        with console.waiting("opening processor"):
            processor = load_opened_processor(checkpoint, layout)
        token_limit(processor, layout, max_positions(checkpoint), answer_tokens=1)(sample)
        dtype = compute_dtype(checkpoint, layout, dtype, default_device(), console.note)
        with console.waiting("loading the model"):
            loaded = load_opened(checkpoint, pyramid, dtype, device_map=default_device())
    _choose(loaded, budget, experts)
    done = answer(loaded, processor, sample, max_new_tokens, (lambda text: None) if as_json else _stream)
    asked = loaded.pyramid.budget if experts is None else None
    spending = None if asked is None else Spending(asked, done.flops_fraction, samples=1)
    if as_json:
        found = {"checkpoint": str(folder), **done.to_dict(), "budget": spending and spending.to_dict()}
        console.print_json(found)
        return
    console.echo("")
    console.note(_cost_line(done))
    for line in unmet([spending], pyramid, folder, data=None) if spending else ():
        console.note(line)


def _sample(question: str, images: tuple[str, ...], allow_urls: bool) -> "Sample":
    """Return what is asked; images that cannot be used are refused before torch is imported."""
    from dpn_cli.data.places import Places
    from dpn_cli.data.samples import Sample, Turn
    from dpn_cli.data.scan import validate_images

    places = Places(allow_urls=allow_urls)
    sources = tuple(places.find(image, f"--image {image:.{SHOWN}}", partial(str, image)) for image in images)
    sample = Sample("question", sources, (Turn(question),))
    validate_images(sample)
    return sample


def _choose(model: "PyramidGenerationMixin", budget: float | None, experts: tuple[int, ...] | None) -> None:
    try:
        if budget is not None:
            model.set_budget(budget)
        if experts is not None:
            model.set_route(experts)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _stream(text: str) -> None:
    console.echo(text, nl=False)


def _cost_line(done: "Answer") -> str:
    tokens = " → ".join(map(str, done.visual_tokens))
    speed = f", {done.tokens_per_s:.1f} tokens/s" if done.tokens_per_s else ""
    return (
        f"Route {done.experts}: visual tokens {tokens}, {done.flops_fraction:.1%} of the prefill FLOPs; first token "
        f"after {done.first_token_s:.2f} s, {done.new_tokens} tokens in {done.total_s:.2f} s{speed}"
    )
