"""The samples of a calibration: those that are measured, and those that only healing and predictors read. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.data.samples import Sample
from dpn_cli.data.scan import Dataset
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.reporter import SILENT, Reporter


@dataclass(frozen=True)
class CalibrationData:
    """What a calibration reads.

    Attributes:
        measured: Samples to measure, the same ones healed or not.
        further: Samples that only healing and predictors read.
        digest: Digest of all of them; see `Dataset`.
    """

    measured: Dataset
    further: Sequence[Sample]
    digest: str

    @property
    def samples(self) -> list[Sample]:
        """The samples to measure, and after them the further ones."""
        return [*self.measured.samples, *self.further]

    @property
    def asked(self) -> list[Sample]:
        """Those of `samples` that have an image."""
        return [sample for sample in self.samples if sample.images]

    @property
    def num_measured(self) -> int:
        """How many of `asked` are to be measured; they come first."""
        return sum(bool(sample.images) for sample in self.measured.samples)


def load_samples(
    data: DataOptions,
    recipe: CalibrationRecipe,
    check: Callable[[Sample], None] = lambda sample: None,
    reporter: Reporter = SILENT,
) -> CalibrationData:
    """Draw and check the samples of a calibration; arguments and errors as in `load_data`."""

    def load(count: int, reporter: Reporter) -> Dataset:
        return load_data(data, recipe.prompts, limit=count, seed=recipe.seed, check=check, reporter=reporter)

    measured = load(recipe.samples, reporter)
    if recipe.samples_read == recipe.samples:
        return CalibrationData(measured, (), measured.digest)
    # What was found was said of the first ones.
    unsaid = replace(
        reporter, note=SILENT.note, progress=lambda _, total: reporter.progress("reading more data", total)
    )
    more, known = load(recipe.samples_read, unsaid), set(measured.contents)  # a stream numbers its rows anew
    pairs = zip(more.samples, more.contents, strict=True)
    further = [sample for sample, content in pairs if content not in known]
    return CalibrationData(measured, further, f"{measured.digest}, {more.digest}")
