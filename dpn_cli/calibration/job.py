"""A calibration that is about to start: checks, samples and models, and how its samples are shared out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import nn

from dpn_cli.calibration.other_teacher import OtherTeacher
from dpn_cli.calibration.samples import CalibrationData, load_samples
from dpn_cli.calibration.settings import Only, candidates, validate_kept
from dpn_cli.calibration.state import MeasurementState, drop_state
from dpn_cli.calibration.teacher import Teacher
from dpn_cli.calibration.training.tuning import frozen_dtype, validate_processes
from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.initial import initial_tensors
from dpn_cli.checkpoint.layout import LlavaLayout, open_converted
from dpn_cli.checkpoint.lora import Lora
from dpn_cli.data.encoding import expected_grids, prompt_tokens, token_limit
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import DataError, RecipeError, UsageError
from dpn_cli.inference.adapter import require_peft
from dpn_cli.inference.dtypes import AUTO, compute_dtype, loaded_size
from dpn_cli.inference.loading import default_device, load_opened_processor, max_positions
from dpn_cli.inference.provenance import in_words
from dpn_cli.inference.quantised import load_frozen
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.parallel.fingerprint import fingerprint, model_fingerprint, served_digest, validate_same
from dpn_cli.parallel.launch import on_this_machine
from dpn_cli.parallel.processes import Processes
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.reach import Length, cheapest_fraction, validate_budget
from dpn_cli.reporter import Reporter

MIN_SAMPLES = 16
MIN_FITTED = 4  # of them, to fit routers to


@dataclass(frozen=True)
class Job:
    """What the stages of a calibration work with; only the main process has a state.

    Attributes:
        teacher: Model that answers, and that is measured against.
        lengths: Prompt lengths of the samples that the budget table is computed from.
        candidates: the sites and experts that a survey is to choose from; None where the routes are given.
        only: the one stage that is run on a checkpoint that is calibrated; None for a whole calibration.
    """

    model: PyramidGenerationMixin
    layout: LlavaLayout
    processor: Any
    teacher: Teacher
    recipe: CalibrationRecipe
    state: MeasurementState | None
    processes: Processes
    reporter: Reporter
    lengths: Sequence[Length]
    candidates: PyramidConfig | None
    only: Only | None = None

    @property
    def other(self) -> Teacher | None:
        """The teacher, where it is another model."""
        return None if self.teacher.model is self.model else self.teacher


def open_job(
    folder: Path,
    data: DataOptions,
    recipe: CalibrationRecipe,
    reporter: Reporter,
    teacher: str | None,
    restart: bool,
    processes: Processes,
    only: Only | None,
) -> tuple[Job, CalibrationData]:
    """Check the teacher and the data, then the state of an earlier run, then load the models."""
    needed = 1 if only == "budgets" else MIN_SAMPLES
    with processes.as_one():
        if recipe.samples < needed:
            raise UsageError(f"--samples {recipe.samples} (calibration.samples): a calibration needs {needed} or more")
        validate_processes(recipe, processes.count)
        checkpoint, layout, pyramid = open_converted(folder)
        if pyramid.static_route is not None:
            raise UsageError(f"{folder} has a fixed route, so no router chooses: there is nothing to calibrate")
        if only:
            validate_kept(folder, pyramid, only)
        surveyed = None if only else candidates(folder, pyramid, layout.shape.num_layers, recipe.survey)
        if recipe.trains_adapter:
            require_peft()
        processor, other, read = read_samples(checkpoint, layout, data, recipe, teacher, reporter)
        asked = read.asked
        if read.num_measured < needed:
            raise DataError(
                f"--data {data.name} has {read.num_measured} samples with an image, calibration needs {needed}"
            )
        held = asked if only == "budgets" else [asked[i] for i in split_rows(read, recipe)[0]]
        lengths = [
            (expected_grids(sample, layout), prompt_tokens(sample, processor, recipe.answer_tokens)) for sample in held
        ]
        if only == "budgets" and recipe.budget == (pyramid.budget or 1.0):  # nobody has asked for it
            recipe = _within_reach(recipe, cheapest_fraction(layout.shape, pyramid, lengths), reporter)
        validate_budget(recipe, layout.shape, surveyed or pyramid, lengths)
        measured = fingerprint(checkpoint, read.digest, recipe, surveyed or pyramid, surveys=surveyed is not None)
        measured |= {"teacher": other and model_fingerprint(other.checkpoint), "only": only}
        if only:
            measured |= {"routers": served_digest(checkpoint, Lora.of(folder, pyramid))}
    everywhere = processes.gather(measured)
    with processes.as_one():
        validate_same(everywhere)
        if restart and processes.is_main:
            drop_state(folder)
        state = MeasurementState(folder, measured) if processes.is_main else None
        device = default_device()
        dtypes = _dtypes(checkpoint, layout, other, recipe, device, reporter)
    dtypes = processes.agree(dtypes)
    with processes.as_one(), reporter.waiting("loading the model"):
        model = load_frozen(checkpoint, pyramid, recipe.load_in, dtypes[0], healed=only == "budgets", device_map=device)
        taught_by = Teacher(model, processor, recipe.answer_tokens)
        if other:
            taught_by = other.load(dtypes[1], recipe, device)
    if not only:
        start_afresh(model.text_model.routers)
    together = f"; {processes.count} processes" if processes.count > 1 else ""
    reporter.note(f"{read.num_measured} samples from {data.name}; computing on {in_words(model)}{together}")
    return Job(model, layout, processor, taught_by, recipe, state, processes, reporter, lengths, surveyed, only), read


def read_samples(
    checkpoint: Checkpoint,
    layout: LlavaLayout,
    data: DataOptions,
    recipe: CalibrationRecipe,
    teacher: str | None,
    reporter: Reporter,
) -> tuple[Any, OtherTeacher | None, CalibrationData]:
    """Return a checkpoint's processor, its teacher if that is another model, and the samples that both can read."""
    with reporter.waiting("opening processor"):
        processor = load_opened_processor(checkpoint, layout)
    check = token_limit(processor, layout, max_positions(checkpoint), recipe.answer_tokens)
    other = None if teacher is None else OtherTeacher.open(teacher)
    if other:
        check = other.check(check, checkpoint.path, processor, recipe.answer_tokens)
    return processor, other, load_samples(data, recipe, check, reporter)


def _dtypes(
    checkpoint: Checkpoint,
    layout: LlavaLayout,
    other: OtherTeacher | None,
    recipe: CalibrationRecipe,
    device: str,
    reporter: Reporter,
) -> list[str]:
    """Return what to load the model in, and another teacher after it; says what both will take."""
    models = [(checkpoint, layout), *([(other.checkpoint, other.layout)] if other else [])]
    sizes = [loaded_size(*each, AUTO, recipe.load_in) for each in models]
    dtypes = []
    for i, each in enumerate(models):
        dtypes.append(
            compute_dtype(
                *each, frozen_dtype(recipe), device, reporter.note, load_in=recipe.load_in, copies=on_this_machine(),
                beside=sum(sizes) - sizes[i],
            )
        )  # fmt: skip
        sizes[i] = loaded_size(*each, dtypes[i], recipe.load_in)
    if other:
        own, theirs = map(decimal, sizes)
        everywhere = " in every process" if on_this_machine() > 1 else ""
        reporter.note(
            f"The weights take {own} of memory for the model and {theirs} for the teacher {other.name}, together "
            f"{decimal(sum(sizes))}{everywhere}."
        )
    return dtypes


def _within_reach(recipe: CalibrationRecipe, cheapest: float, reporter: Reporter) -> CalibrationRecipe:
    """Ask for the cheapest budget that some data can meet where less is asked for."""
    if recipe.budget >= cheapest:
        return recipe
    reporter.note(
        f"Budget {recipe.budget:g} is out of reach on these data; the cheapest is {cheapest:.3f}, "
        "which is used instead."
    )
    return recipe.model_copy(update={"budget": cheapest})


def split_rows(read: CalibrationData, recipe: CalibrationRecipe) -> tuple[list[int], list[int], list[int]]:
    """Return which of `read.asked` are held out, which are measured to learn from, and the further ones.

    Raises:
        RecipeError: if so many are held out that too few are left to learn from.
    """
    measured = read.num_measured
    order = torch.randperm(measured, generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    num_held = recipe.num_held(measured)
    if measured - num_held < MIN_FITTED:
        raise RecipeError(
            f"calibration.holdout: {recipe.holdout} holds {num_held} of {measured} samples out and leaves "
            f"{measured - num_held} to fit routers to, which need {MIN_FITTED}: lower it"
        )
    return order[:num_held], order[num_held:], list(range(measured, len(read.asked)))


def start_afresh(modules: nn.Module) -> None:
    """Make routers what they are after conversion: what an earlier or killed calibration left is gone."""
    shapes = {name: tuple(tensor.shape) for name, tensor in modules.state_dict().items()}
    modules.load_state_dict({name: torch.from_numpy(values) for name, values in initial_tensors(shapes)})
