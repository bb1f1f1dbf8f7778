"""`dpn convert`: insert a pyramid into a LLaVA."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpn_cli import console, workspace
from dpn_cli.checkpoint.source import DEMO
from dpn_cli.commands.completion import names, recipe_names
from dpn_cli.commands.options import set_option
from dpn_cli.commands.replaced import in_place_of
from dpn_cli.commands.tables.experts import show_sites
from dpn_cli.extras import extra
from dpn_cli.families.family import ALIASES, CONVERTED

if TYPE_CHECKING:
    from dpn_cli.conversion.convert import Conversion

PLACEMENTS = {
    "copied": "copied unchanged",
    "cloned": "shared with the source (reflinks)",
    "linked": "shared with the source (hard links: do not edit either in place)",
    "rewritten": "written in Hugging Face's layout",
}


@click.command(
    "convert",
    help=f"""Turn MODEL's language model into a pyramid; lossless until calibrated.

    MODEL is a checkpoint folder (in Hugging Face's layout or the original LLaVA one), a hub id (owner/name, or
    owner/name@revision), or one of
    {", ".join([*ALIASES, DEMO])}.
    """,
)
@click.argument("model", shell_complete=names(lambda: (*ALIASES, DEMO), or_files=True))
@click.option(
    "--recipe", metavar="NAME|FILE", help="The recipe (see `dpn recipes`); default: the one made for the model.",
    shell_complete=names(recipe_names, or_files=True),
)  # fmt: skip
@set_option
@click.option(
    "--vision-tower",
    metavar="PATH|ID",
    help="The CLIP model for a checkpoint in the original LLaVA layout; default: the one that its config.json names.",
)
@click.option(
    "--chat-template", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="FILE",
    help="A Jinja template for prompts, with MODEL's image token for every image; default: MODEL's own.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The folder to write; default: ./NAME-dpn.")
@click.option(
    "--link", is_flag=True,
    help="Share the weights with MODEL's files, by reflinks or else hard links, instead of copying them. A hard link "
    "is the same file under a second name: editing one in place changes both (dpn never does so).",
)  # fmt: skip
@click.option(
    "--check-values/--no-check-values", default=False, show_default=True,
    help="Search MODEL for NaN and infinite values first.",
)  # fmt: skip
@click.option(
    "--verify", is_flag=True, help="Read the output back from the disk and compare it with MODEL, byte by byte."
)
@click.option("-f", "--force", is_flag=True, help="Replace an output folder that dpn wrote earlier.")
@click.option(
    "-n", "--dry-run", is_flag=True, help="Check everything and report what would be done, but write nothing."
)
def command(
    model: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    vision_tower: str | None,
    chat_template: Path | None,
    output: Path | None,
    link: bool,
    check_values: bool,
    verify: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """Check the options, convert, and show what was done."""
    workspace.check_state_folder()
    from dpn_cli.checkpoint.headers import read_config
    from dpn_cli.checkpoint.source import resolve_source
    from dpn_cli.checkpoint.staging import check_target
    from dpn_cli.conversion.convert import IMPORTED, convert, default_output, default_recipe
    from dpn_cli.pyramid.recipe_files import load_recipe

    chosen = load_recipe(recipe, overrides) if recipe else None
    if output is not None:
        check_target(output, force, CONVERTED, Path(model).expanduser())
    source = resolve_source(model)  # a download shows how far it is
    if recipe is None and overrides:
        chosen = load_recipe(default_recipe(source, read_config(source.path)), overrides)
    output = default_output(source) if output is None else output
    replaced = in_place_of(output)
    with console.waiting("converting"):
        done = convert(
            model, chosen, output, force, dry_run, vision_tower, link=link, check_values=check_values, verify=verify,
            chat_template=chat_template, reporter=console.REPORTER,
        )  # fmt: skip

    try:
        if not dry_run:  # before anything is shown: the reader may be gone
            with extra(f"{workspace.FOLDER} cannot be written here, so pass  --model {done.output}"):
                workspace.remember(done.output)
    finally:
        _show(done, link)
    if dry_run:
        console.note("Dry run: nothing was written.")
        return
    step = "export" if done.recipe == IMPORTED else "calibrate --data DATA"
    console.note(f"Wrote {done.output}{replaced}. Next: dpn {step}")


def _show(done: "Conversion", link: bool) -> None:
    show_sites(f"{done.source.reference} → {done.output} (recipe {done.recipe})", done.pyramid.sites)
    for note in done.notes:
        console.note(note)
    if link and done.placement in ("copied", "rewritten"):
        console.note("--link: nothing could be linked (another file system, or weights in another format).")
    console.note(
        f"{done.base_bytes / 1e6:,.1f} MB of tensors {PLACEMENTS[done.placement]}, {len(done.added)} tensors "
        f"({done.added_parameters:,} parameters) added."
    )
