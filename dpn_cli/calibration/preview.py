"""What a calibration would read, ask and cost, before any model is loaded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dpn_cli.calibration.forecast import Forecast, Model, Reader, forecast
from dpn_cli.calibration.job import MIN_SAMPLES, read_samples
from dpn_cli.calibration.other_teacher import OtherTeacher
from dpn_cli.calibration.samples import CalibrationData, load_samples
from dpn_cli.calibration.settings import candidates, has_recipe
from dpn_cli.calibration.training.tuning import frozen_dtype
from dpn_cli.checkpoint.headers import Checkpoint
from dpn_cli.checkpoint.inspection import parts
from dpn_cli.checkpoint.layout import LlavaLayout, open_converted, stored_dtype
from dpn_cli.data.encoding import expected_grids, prompt_tokens
from dpn_cli.data.findings import Scan
from dpn_cli.data.options import DataOptions
from dpn_cli.data.rendering import chat_prompt
from dpn_cli.data.samples import ImageSource, Sample, StoredImage
from dpn_cli.inference.dtypes import AUTO, compute_dtype, loaded_size
from dpn_cli.inference.loading import default_device
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.reporter import SILENT, Reporter

SHOWN = 3  # samples


@dataclass(frozen=True)
class Shown:
    """A sample as a model is asked.

    Attributes:
        row: Number of its row.
        images: Names of its images, each with height and width in pixels.
        prompt: Text up to the last answer, from the chat template if there is a checkpoint.
        answer: Answer that is the target; None where the model answers itself.
    """

    row: int
    images: tuple[tuple[str, int, int], ...]
    prompt: str
    answer: str | None


@dataclass(frozen=True)
class Preview:
    """What a calibration would read, ask and cost.

    Attributes:
        scan: Counts of what was read.
        columns: Roles of the columns, empty for those that are not read.
        asked: First samples, as they are asked.
        forecast: Cost of the calibration; None without a checkpoint to calibrate, or with too few samples for it.
    """

    scan: Scan
    columns: dict[str, str]
    asked: tuple[Shown, ...]
    forecast: Forecast | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def preview(
    data: DataOptions,
    folder: Path | None,
    recipe: CalibrationRecipe,
    reporter: Reporter = SILENT,
    teacher: str | None = None,
) -> Preview:
    """Read the data as a calibration does, with the same checks, and say what it would ask and cost.

    Args:
        data: Data to read.
        folder: Checkpoint that will be asked; None for the data alone.
        recipe: Settings of the calibration.
        reporter: Told about the progress.
        teacher: Folder, alias or hub id of another model as the teacher; None for the model itself.

    Raises:
        DataError: as `load_data`.
        CheckpointError: if the checkpoint cannot be calibrated, or the teacher cannot teach it.
    """
    if folder is None:
        dataset = load_samples(data, recipe, reporter=reporter).measured
        asked = tuple(_shown(sample, None) for sample in dataset.samples[:SHOWN])
        return Preview(dataset.scan, dataset.columns, asked, None)
    checkpoint, layout, pyramid = open_converted(folder)
    processor, other, read = read_samples(checkpoint, layout, data, recipe, teacher, reporter)
    dataset = read.measured
    with reporter.waiting("estimating"):
        cost = _forecast(read, processor, checkpoint, layout, pyramid, recipe, reporter, other)
    asked = tuple(_shown(sample, processor) for sample in dataset.samples[:SHOWN])
    return Preview(dataset.scan, dataset.columns, asked, cost)


def _forecast(
    read: CalibrationData, processor: Any, checkpoint: Checkpoint, layout: LlavaLayout, pyramid: PyramidConfig,
    recipe: CalibrationRecipe, reporter: Reporter, other: OtherTeacher | None,
) -> Forecast | None:  # fmt: skip
    """Estimate what a calibration costs on some samples; None of an export, or where they are too few."""
    asked, samples = read.asked, read.asked[: read.num_measured]
    if len(samples) < MIN_SAMPLES or not has_recipe(checkpoint.path):
        return None
    surveyed = candidates(checkpoint.path, pyramid, layout.shape.num_layers, recipe.survey)

    def reader(checkpoint: Checkpoint, layout: LlavaLayout, processor: Any) -> Reader:
        tokens = recipe.answer_tokens
        lengths = [(expected_grids(each, layout), prompt_tokens(each, processor, tokens)) for each in samples]
        return Reader(_model(checkpoint, layout, recipe, reporter), lengths)

    own = reader(checkpoint, layout, processor)
    teacher = None if other is None else reader(other.checkpoint, other.layout, other.processor)
    unanswered = sum(not sample.is_answered for sample in asked)
    learned = len(asked) - recipe.num_held(len(samples))
    return forecast(
        own.model, surveyed or pyramid, recipe, own.lengths, unanswered, surveys=surveyed is not None, teacher=teacher,
        watched=min(learned, recipe.predictors.samples) if recipe.predictors else 0,
    )  # fmt: skip


def _model(checkpoint: Checkpoint, layout: LlavaLayout, recipe: CalibrationRecipe, reporter: Reporter) -> Model:
    """Return the sizes of a checkpoint's model as a calibration loads it."""
    device = default_device()
    dtype = compute_dtype(checkpoint, layout, frozen_dtype(recipe), device, reporter.note, load_in=recipe.load_in)
    name = stored_dtype(checkpoint, layout) if dtype == AUTO else dtype
    vision = sum(part.parameters for part in parts(checkpoint, layout) if part.name == "vision_tower")
    size = loaded_size(checkpoint, layout, dtype, recipe.load_in)
    return Model(layout.shape, size, vision, getattr(torch, name or "float32"), device)


def _shown(sample: Sample, processor: Any) -> Shown:
    """Return a sample as it is asked, with all turns before the last question."""
    names = [_name(image) for image in sample.images]
    images = tuple((name, *size) for name, size in zip(names, sample.image_sizes(), strict=True))
    last = len(sample.turns) - 1
    prompt = _plain(sample) if processor is None else chat_prompt(processor, sample, last)
    return Shown(sample.row, images, prompt, sample.turns[last].answer)


def _name(image: ImageSource) -> str:
    if isinstance(image, Image.Image):
        return "a picture in memory"
    return image.name if isinstance(image, StoredImage) else str(image)


def _plain(sample: Sample) -> str:
    """Return the texts of a conversation, where no chat template is known."""
    texts: Sequence[str | None] = [
        sample.system,
        *(text for turn in sample.turns for text in (turn.question, turn.answer)),
    ]
    return "\n".join(text for text in texts[: len(texts) - 1] if text)
