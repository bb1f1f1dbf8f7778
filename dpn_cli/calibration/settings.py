"""Which calibration a checkpoint asks for. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import read_config, read_json
from dpn_cli.checkpoint.writer import RECIPE_FILE
from dpn_cli.errors import CheckpointError
from dpn_cli.recipe import CalibrationRecipe, Recipe, apply_override


def calibration_recipe(folder: Path, overrides: Sequence[str], options: dict[str, Any]) -> CalibrationRecipe:
    """Return the calibration section of the recipe that a checkpoint was converted with.

    Args:
        folder: from `dpn convert`.
        overrides: `key.path=value` changes.
        options: values of the calibration section that go before all else.

    Raises:
        CheckpointError: if the folder is not a converted checkpoint.
        RecipeError: if an override is wrong.
    """
    read_config(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise CheckpointError(
            f"{folder} has no {RECIPE_FILE}: expected a folder that `dpn convert` wrote, and none whose pyramid came "
            "with the source"
        )
    data = read_json(folder / RECIPE_FILE)
    for override in overrides:
        apply_override(data, override)
    data["calibration"] = {**data.get("calibration", {}), **options}
    return Recipe.from_dict(data, where=str(folder / RECIPE_FILE)).calibration
