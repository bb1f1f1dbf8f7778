"""What a calibration trains beside its routers, if its recipe says so, and how that is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpn_cli.calibration.teacher import Teacher
from dpn_cli.calibration.training.heal import heal, trade_offs_around
from dpn_cli.calibration.training.loop import TrainingReport
from dpn_cli.calibration.training.paper import train_as_paper
from dpn_cli.data.encoding import Encoded
from dpn_cli.data.samples import Sample
from dpn_cli.errors import UsageError
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.processes import Processes
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.reporter import Reporter


def frozen_dtype(recipe: CalibrationRecipe) -> str:
    """Return the dtype to load the model in, in the recipe's words: the calibration's, else the training's."""
    return recipe.training.dtype if recipe.training and recipe.dtype == "auto" else recipe.dtype


def validate_processes(recipe: CalibrationRecipe, count: int) -> None:
    """Check that every process gets a forward pass of each training step.

    Raises:
        UsageError: if there are more processes than that.
    """
    training = recipe.training
    if training and count > training.gradient_accumulation:
        raise UsageError(
            f"{count} processes cannot share the {training.gradient_accumulation} forward passes of a training step: "
            f"start at most {training.gradient_accumulation}, or raise gradient_accumulation and lower batch_size"
        )


def tune(
    model: PyramidGenerationMixin,
    processor: Any,
    samples: Sequence[tuple[Sample, bool]],
    recipe: CalibrationRecipe,
    state: Path | None,
    processes: Processes,
    reporter: Reporter,
    other: Teacher | None = None,
) -> TrainingReport | None:
    """Heal the model, or train it as the paper does; None if the recipe asks for neither.

    Args:
        model: the converted one; with fitted routers where it is to be healed.
        processor: the checkpoint's.
        samples: none of those that the result is judged by, all answered; each with whether its answers are from the
            data rather than the teacher's own.
        recipe: Training recipe, which says what is trained.
        state: a folder for what a run that was killed goes on from; the main process's.
        processes: Processes that train together.
        reporter: Reporter of the progress.
        other: Teacher that is another model; None for the model itself.
    """
    training, as_paper = recipe.training, recipe.objective == "paper"
    if training is None:
        return None
    examples = Encoded([sample for sample, _ in samples], processor, recipe.answer_tokens)
    options: dict[str, Any] = {
        "pad_token_id": processor.tokenizer.pad_token_id,
        "seed": recipe.seed,
        "state": state,
        "processes": processes,
        "other": other,
    }
    with reporter.progress("training" if as_paper else "healing", training.steps) as advance:
        if as_paper:
            return train_as_paper(model, examples, recipe, advance=advance, **options)
        has_labels = [labelled for _, labelled in samples]
        around = trade_offs_around(model.pyramid, recipe.budget, recipe.heal.budget_spread)
        report = heal(model, examples, has_labels, recipe.heal, trade_offs=around, advance=advance, **options)
    reporter.note(_outcome(report))
    return report


def _outcome(report: TrainingReport) -> str:
    """Say what held-out samples say of healing."""
    if not report.held_out:
        return (
            "The adapter is kept without being judged: there are too few samples to hold any out. Calibrate on more, "
            "or compare with the checkpoint as it was (dpn eval)."
        )
    if report.kept == 0:
        return "Healing did not help on held-out samples, so no adapter is kept."
    before, after = report.held_out[0], report.held_out[report.kept]
    return f"On held-out samples, healing lowers the loss from {before:.3f} to {after:.3f} ({report.kept} steps)."
