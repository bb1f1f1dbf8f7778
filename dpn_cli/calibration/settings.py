"""Which calibration a checkpoint asks for. No torch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dpn_cli.checkpoint.headers import check_folder, read_json
from dpn_cli.checkpoint.layout import open_converted
from dpn_cli.checkpoint.writer import RECIPE_FILE
from dpn_cli.errors import CheckpointError, RecipeError, UsageError
from dpn_cli.families.family import DEFAULT_RECIPE
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe, PredictorRecipe, SurveyRecipe
from dpn_cli.pyramid.config import ADAPTER_KEY, IMPORTED_USE, PyramidConfig
from dpn_cli.pyramid.experts import KINDS
from dpn_cli.pyramid.recipe import Recipe
from dpn_cli.pyramid.recipe_files import apply_override, load_recipe

STATE_FOLDER = Path("calibration", "state")  # of a calibration that goes on
_MEASURING = {"samples", "batch_size", "answer_tokens", "seed"}  # settings of an earlier calibration that are kept
Only = Literal["budgets", "heal"]
"""The one stage that is run on a checkpoint that is calibrated already."""
_SET_FOR_BUDGETS = {f"calibration.{key}" for key in (*_MEASURING, "budget", "dtype", "load_in", "prompts")}


def has_recipe(folder: Path) -> bool:
    """Tell whether a folder is one of `dpn convert`, which keeps the recipe, rather than an export."""
    return (folder / RECIPE_FILE).is_file()


def calibration_recipe(folder: Path, overrides: Sequence[str], options: dict[str, Any]) -> CalibrationRecipe:
    """Return the calibration section of the recipe that a checkpoint was converted with.

    Args:
        folder: Checkpoint that `dpn convert` wrote.
        overrides: `key.path=value` changes.
        options: values of the calibration section that go before all else.

    Raises:
        CheckpointError: if the folder is not a converted checkpoint, or its pyramid came with the source.
        RecipeError: if an override is wrong.
    """
    check_folder(folder)
    if not has_recipe(folder):
        if open_converted(folder)[2].is_imported:
            raise CheckpointError(
                f"{folder}: the pyramid was trained together with the model, so there is no original model to "
                f"calibrate against: {IMPORTED_USE}"
            )
        raise CheckpointError(
            f"{folder} has no {RECIPE_FILE}, so `dpn convert` did not write it; if it is an export, calibrate the "
            "folder that it was exported from (--budgets-only takes exports, too)"
        )
    for key in map(_key, overrides):
        if not key.startswith("calibration."):
            raise RecipeError(
                f"--set {key}: a calibration takes calibration.KEY alone; what belongs to the pyramid is set when it "
                "is made, with `dpn convert --set`"
            )
    recipe = _resolved(read_json(folder / RECIPE_FILE), overrides, options, where=folder / RECIPE_FILE)
    for key in map(_key, overrides):
        if key.split(".")[1] in recipe.calibration.unused_sections and key != "calibration.heal.method":
            raise RecipeError(
                f"--set {key} has no effect without calibration.heal.method=lora (--heal lora) or "
                "calibration.objective=paper: leave it out, or pass that, too"
            )
    predictors = (recipe.calibration.predictors or PredictorRecipe()) if recipe.predicts else None
    return recipe.calibration.model_copy(update={"predictors": predictors})


def validate_replaceable(folder: Path, force: bool, restart: bool, only: Only | None = None) -> None:
    """Check that no results are lost that somebody wants to keep; solving budgets loses none.

    Raises:
        UsageError: if the checkpoint is calibrated, unless an unfinished calibration goes on, which may replace it.
    """
    pyramid = open_converted(folder)[2]
    goes_on = (folder / STATE_FOLDER).is_dir() and not restart
    if not pyramid.budgets or force or goes_on or only == "budgets":
        return
    if only == "heal":
        raise UsageError(
            f"{folder}: healing replaces the routers that were calibrated {pyramid.calibrated_on}: copy the folder if "
            "you want to keep them, and pass --force"
        )
    raise UsageError(
        f"{folder} is calibrated already, {pyramid.calibrated_on}: copy the folder if you want to keep that, and "
        "pass --force to replace it (another budget needs no calibration: dpn export --budget)"
    )


def validate_kept(folder: Path, pyramid: PyramidConfig, only: Only) -> None:
    """Check that a checkpoint has what only one stage of a calibration builds on.

    Raises:
        UsageError: if it is not calibrated, or is to be healed a second time.
    """
    if not pyramid.budgets:
        raise UsageError(f"{folder} has no calibrated routers that could be kept: calibrate without --{only}-only")
    if only == "heal" and ADAPTER_KEY in pyramid.calibration:
        raise UsageError(f"{folder} is healed already: calibrate it again, with --heal lora instead of --heal-only")


def healing_recipe(folder: Path, overrides: Sequence[str], options: dict[str, Any]) -> CalibrationRecipe:
    """Return the recipe of a calibration that only heals: as before, without what chooses experts.

    Raises:
        RecipeError: if an override is wrong, or about what stays.
        UsageError: if no method is to heal.
    """
    for key in map(_key, overrides):
        if key.startswith(("calibration.survey", "calibration.predictors")):
            raise RecipeError(f"--heal-only keeps the experts and the routes: leave out --set {key}")
    known = [f"calibration.{key}={value}" for key, value in _recorded(open_converted(folder)[2]).items()]
    recipe = calibration_recipe(folder, ("calibration.heal.method=lora", *known, *overrides), options)
    if recipe.heal.method == "none":
        raise UsageError("--heal-only and calibration.heal.method=none (--heal none) contradict each other")
    return recipe.model_copy(update={"predictors": None})


def budgets_recipe(folder: Path, overrides: Sequence[str], options: dict[str, Any]) -> CalibrationRecipe:
    """Return how a calibrated checkpoint is measured where only its budgets are solved: as before, nothing is trained.

    Args:
        folder: converted or exported.
        overrides: `KEY=VALUE` pairs, as in `calibration_recipe`.
        options: Overrides from options of their own; without a budget among them, the checkpoint's is taken.

    Raises:
        CheckpointError: if the folder is neither.
        RecipeError: if an override is wrong.
    """
    for key in map(_key, overrides):
        if key not in _SET_FOR_BUDGETS:
            raise RecipeError(
                f"--budgets-only trains nothing and keeps the routes: leave out --set {key}; it takes "
                f"{', '.join(sorted(_SET_FOR_BUDGETS))}"
            )
    pyramid = open_converted(folder)[2]
    data = read_json(folder / RECIPE_FILE) if has_recipe(folder) else load_recipe(DEFAULT_RECIPE).to_dict()
    data["calibration"] = {**data.get("calibration", {}), "budget": 1.0, **_recorded(pyramid)}
    options = {**options, "objective": "rate_distortion", "heal": {"method": "none"}, "predictors": None}
    return _resolved(data, overrides, options, where=folder).calibration


def _recorded(pyramid: PyramidConfig) -> dict[str, Any]:
    """Return how a checkpoint was measured when it was calibrated, and the budget that it is set to."""
    recorded = {key: value for key, value in pyramid.calibration.items() if key in _MEASURING}
    return recorded | ({"budget": pyramid.budget} if pyramid.budget else {})


def recipe_name(folder: Path) -> str:
    """Return the name of the recipe that a checkpoint was converted with."""
    return Recipe.from_dict(read_json(folder / RECIPE_FILE), where=str(folder / RECIPE_FILE)).name


def candidates(folder: Path, pyramid: PyramidConfig, num_layers: int, survey: SurveyRecipe) -> PyramidConfig | None:
    """Return the sites and experts that a survey is to choose from; None where the routes are given.

    Args:
        folder: the converted checkpoint, with its recipe.
        pyramid: the checkpoint's, which an earlier survey may have pruned.
        num_layers: depth of the decoder.
        survey: names the kinds of experts to try.

    Raises:
        RecipeError: if no site has an expert of one of these kinds, or kinds are named where the routes are given.
    """
    recipe = Recipe.from_dict(read_json(folder / RECIPE_FILE), where=str(folder / RECIPE_FILE))
    if not recipe.surveys:
        if survey.experts is not None:
            raise RecipeError(f"the routes of {folder} are given by its recipe, so there are no experts to choose from")
        return None
    menu = recipe.pyramid_config(num_layers).sites
    offered = {expert.kind for site in menu for expert in site.experts}
    kinds = {"keep", *(offered if survey.experts is None else survey.experts)}
    if missing := sorted(kinds - offered):
        choices = [kind for kind in KINDS if kind in offered and kind != "keep"]
        raise RecipeError(
            f"no site of {folder} has experts of the kinds {', '.join(missing)}: choose from {', '.join(choices)}, "
            "or convert with a recipe that has them"
        )
    sites = [replace(site, experts=tuple(each for each in site.experts if each.kind in kinds)) for site in menu]
    sites = [site for site in sites if len(site.experts) > 1]
    if not sites:
        raise RecipeError(f"no site of {folder} would have a choice: name at least one kind of expert besides keep")
    return replace(pyramid.with_all_routes(), sites=tuple(sites), budgets=(), trade_off=0.0)


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _resolved(data: dict[str, Any], overrides: Sequence[str], options: dict[str, Any], where: Path) -> Recipe:
    """Return the recipe of some plain data, with overrides, and with options in its calibration section."""
    stored = Recipe.from_dict(data, where=str(where))
    if not overrides and not options:
        return stored
    for override in overrides:
        apply_override(data, override)
    data["calibration"] = {**data.get("calibration", {}), **options}
    return Recipe.from_dict(data, where=f"{where} with the options given")
