"""`dpn bench`: latency, memory and FLOPs beside the original and what else there is, in one run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpn_cli import console
from dpn_cli.checkpoint.layout import TEXT_TOKENS
from dpn_cli.checkpoint.source import DEMO
from dpn_cli.commands.completion import listed, names
from dpn_cli.commands.data_options import reading_options, takes_data
from dpn_cli.commands.numbers import Fraction, WholeNumber
from dpn_cli.commands.options import Size, baseline_names, checkpoint_folder, dtype_option, model_option, wide_option
from dpn_cli.errors import UsageError
from dpn_cli.evaluation.baselines import BASELINES
from dpn_cli.extras import extra
from dpn_cli.limits import MAX_BATCH, MAX_ROUNDS, MAX_ROW_IMAGES

if TYPE_CHECKING:
    from dpn_cli.data.options import DataOptions


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
            self.fail(f"{value!r} is not valid: expected numbers of 2 or more, such as 64 or 32,64,128", param, ctx)
        return numbers


@click.command("bench")
@model_option
@click.option(
    "--budget", "budgets", type=Fraction(), multiple=True,
    help="Mean fraction of the original's prefill FLOPs to spend; repeatable.",
)  # fmt: skip
@click.option(
    "--route",
    "routes",
    multiple=True,
    metavar="ROUTE",
    help="One route for all samples: one expert per site, such as keep,keep,2x2,keep,exit; repeatable.",
)
@click.option(
    "--against", metavar="NAME,NAME,…", default="", shell_complete=listed(lambda: (*BASELINES, "all")),
    help="Other methods to measure, at the FLOPs that dpn spends for each --budget: "
    f"{', '.join(BASELINES)}, or all.",
)  # fmt: skip
@click.option(
    "--batch-size", "batch_sizes", type=WholeNumber(1, MAX_BATCH), multiple=True, default=(1,), show_default=True,
    help="Samples per batch; repeatable.",
)  # fmt: skip
@click.option("--images", type=WholeNumber(1, MAX_ROW_IMAGES), help="Images per synthetic sample; default: 1.")
@click.option(
    "--image-size", type=Size(),
    help="Height and width of synthetic images, for models that cut images into tiles; default: 672x672.",
)  # fmt: skip
@click.option(
    "--text-tokens", type=TextTokens(), metavar="N[,N…]",
    help="Text tokens per synthetic sample, in turn for those of a batch; default: as in the calibration data, else "
    f"{TEXT_TOKENS}.",
)  # fmt: skip
@click.option(
    "--data", metavar="DATA", shell_complete=names(lambda: [DEMO], or_files=True),
    help="Data to take the prompts from, as in `dpn calibrate`; default: synthetic prompts.",
)  # fmt: skip
@reading_options
@click.option(
    "--new-tokens",
    type=WholeNumber(1),
    default=16,
    show_default=True,
    help="Number of tokens to generate per sample.",
)
@click.option(
    "--rounds",
    type=WholeNumber(1, MAX_ROUNDS),
    default=8,
    show_default=True,
    help="Number of timed rounds, after one warm-up round.",
)
@dtype_option("auto")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Plot the results into a .png, .svg or .pdf file, which is replaced if it exists.",
)
@wide_option
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@takes_data
def command(
    model: Path | None,
    budgets: tuple[float, ...],
    routes: tuple[str, ...],
    against: str,
    batch_sizes: tuple[int, ...],
    images: int | None,
    image_size: tuple[int, int] | None,
    text_tokens: tuple[int, ...] | None,
    data: "DataOptions | None",
    new_tokens: int,
    rounds: int,
    dtype: str,
    plot: Path | None,
    wide: bool,
    as_json: bool,
) -> None:
    """Measure time to first token, decoding, memory and FLOPs, alternating with the original in one process.

    Without --budget and --route, the checkpoint runs as it is set. Synthetic prompts tell the routers nothing: the
    routers run, but the routes are set to spend the budget. With --data, the routers choose, and other methods spend
    as much.
    """
    names = baseline_names(against)
    if names and not budgets:
        raise UsageError("--against compares at equal FLOPs: give them with --budget")
    wanted = {"images": images, "image_size": image_size, "text_tokens": text_tokens}
    synthetic: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    if data is not None and synthetic:
        raise UsageError("--data brings its own prompts: leave out --images, --image-size and --text-tokens")
    if plot is not None:
        from dpn_cli.evaluation.plots import check_plot

        check_plot(plot)
    folder = checkpoint_folder(model)

    with console.waiting("starting"):
        from dpn_cli.commands.tables.latency import print_latency
        from dpn_cli.evaluation.bench import BenchOptions, SyntheticPrompts, bench_folder
        from dpn_cli.evaluation.drawing import plot_latency

    options = BenchOptions(budgets, routes, names, batch_sizes, new_tokens, rounds, dtype)
    result = bench_folder(folder, data or SyntheticPrompts(**synthetic), options, console.REPORTER)
    try:
        if as_json:
            console.print_json(result.to_dict())
        else:
            for each in result.results:
                print_latency(each, result.has_data, wide)
    finally:
        if plot is not None:
            with extra(f"the picture {plot} is not drawn"):
                plot_latency(plot, result.results, result.has_data)
            console.note(f"Picture: {plot}")
