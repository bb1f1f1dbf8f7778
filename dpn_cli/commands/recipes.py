"""`dpn recipes`: list and show the recipes."""

import json

import click

from dpn_cli import console
from dpn_cli.pyramid.recipe import available_recipes, load_recipe


@click.group("recipes", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print the recipes as JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the recipes, or show one."""
    if ctx.invoked_subcommand:
        return
    recipes = [load_recipe(name) for name in available_recipes()]
    if as_json:
        console.echo(json.dumps([{"name": r.name, "description": r.description} for r in recipes], indent=2))
        return
    width = max(len(recipe.name) for recipe in recipes) + 2
    for recipe in recipes:
        console.echo(f"{recipe.name:{width}}{recipe.description}")


@command.command("show", short_help="Print one recipe in full.")
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value first; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print RECIPE, a name or a YAML file, with everything it inherits and every default."""
    import yaml

    resolved = load_recipe(recipe, overrides).to_dict()
    if as_json:
        console.echo(json.dumps(resolved, indent=2))
    else:
        console.echo(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, default_flow_style=None), nl=False)
