"""`dpn recipes`: list and show the recipes."""

import click
from click.shell_completion import CompletionItem

from dpn_cli import console
from dpn_cli.commands.completion import names, recipe_keys, recipe_names
from dpn_cli.pyramid.recipe_files import available_recipes, load_recipe

YAML_WIDTH = 50  # a line ends with the first item beyond it, and fits 80 columns


class Recipes(click.Group):
    """A group whose word that is no command is a recipe to show."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Read `dpn recipes NAME` as `dpn recipes show NAME`."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["show", *args])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the recipes too."""
        return [*super().shell_complete(ctx, incomplete), *names(recipe_names)(ctx, self.params[0], incomplete)]


@click.group("recipes", cls=Recipes, invoke_without_command=True, subcommand_metavar="[show] [RECIPE]")
@click.option("--json", "as_json", is_flag=True, help="Print the recipes as JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the recipes, or show RECIPE, a name or a YAML file, in full: with all that it inherits and all defaults."""
    if ctx.invoked_subcommand:
        return
    recipes = [load_recipe(name) for name in available_recipes()]
    if as_json:
        console.print_json([{"name": r.name, "description": r.description} for r in recipes])
        return
    console.table(
        "Recipes",
        ["recipe", "what it is for"],
        [(recipe.name, recipe.description) for recipe in recipes],
        texts=["what it is for"],
        legend="dpn recipes NAME shows one in full, dpn convert MODEL --recipe NAME takes it.",
    )


@command.command("show", short_help="Print one recipe in full.")
@click.argument("recipe", shell_complete=names(recipe_names, or_files=True))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value; repeatable.",
    shell_complete=names(recipe_keys),
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print RECIPE, a name or a YAML file, in full: with all that it inherits and all defaults."""
    import yaml

    resolved = load_recipe(recipe, overrides).to_dict()
    if as_json:
        console.print_json(resolved)
    else:
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, default_flow_style=None, width=YAML_WIDTH)
        console.echo(text, nl=False)
