"""Another checkpoint as the teacher: opened, compared with the one to calibrate, and loaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpn_cli.calibration.teacher import Teacher
from dpn_cli.checkpoint.completeness import check_complete
from dpn_cli.checkpoint.headers import Checkpoint, read_config
from dpn_cli.checkpoint.layout import LlavaLayout, open_converted, refuse_quantised
from dpn_cli.checkpoint.locks import in_use
from dpn_cli.checkpoint.processor import complete_processor
from dpn_cli.checkpoint.side_files import without_code
from dpn_cli.checkpoint.source import Source, resolve_source
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.conversion.opening import Copied, open_source
from dpn_cli.data.encoding import answer_ids, token_limit
from dpn_cli.data.faults import RowError
from dpn_cli.data.samples import Sample
from dpn_cli.errors import CheckpointError
from dpn_cli.families.family import Family, is_converted
from dpn_cli.inference.loading import load_opened_processor, max_positions
from dpn_cli.inference.quantised import load_frozen
from dpn_cli.inference.trial import try_out
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.pyramid.config import IMPORTED_USE, PyramidConfig

_ANSWER = "red"  # for samples that have none yet: so short that its end is labelled


@dataclass(frozen=True)
class OtherTeacher:
    """A checkpoint that is to teach another one, opened from its headers alone.

    Attributes:
        source: Source of the checkpoint.
        checkpoint: Checkpoint, with the config of a converted one.
        layout: Layout of the checkpoint.
        pyramid: Pyramid, which is switched off; without sites where it was not converted.
        processor: Processor of the checkpoint.
    """

    source: Source
    checkpoint: Checkpoint
    layout: LlavaLayout
    pyramid: PyramidConfig
    processor: Any

    @classmethod
    def open(cls, model: str) -> "OtherTeacher":
        """Open a folder, an alias or a hub id, as `convert` does, or a folder that dpn wrote.

        Raises:
            CheckpointError: if it is missing, damaged or quantised, cannot run, is in a layout that must be rewritten,
                or has a pyramid that came with its source.
        """
        source = resolve_source(model)
        if is_converted(read_config(source.path)):
            checkpoint, layout, pyramid = open_converted(source.path)
            refuse_quantised(checkpoint)
            if pyramid.is_imported:
                raise CheckpointError(
                    f"{source.label}: the pyramid was trained together with the model, which cannot teach without "
                    f"it: {IMPORTED_USE}"
                )
        else:
            checkpoint, layout = _open_original(source)
            pyramid = PyramidConfig(sites=())
        return cls(source, checkpoint, layout, pyramid, load_opened_processor(checkpoint, layout))

    @property
    def name(self) -> str:
        """What records call it: never by a place on this machine."""
        return self.source.reference

    def check(
        self, own: Callable[[Sample], None], folder: Path, processor: Any, answer_tokens: int
    ) -> Callable[[Sample], None]:
        """Return a check for `load_data` that both models can read a sample, and find the same tokens in its answers.

        Args:
            own: Check of the checkpoint to calibrate.
            folder: Checkpoint to calibrate.
            processor: Processor of that checkpoint.
            answer_tokens: Largest number of tokens of a labelled answer.

        Raises:
            CheckpointError: if the vocabularies differ.
        """
        self._validate_vocabulary(processor.tokenizer.get_vocab(), folder)
        limit = token_limit(self.processor, self.layout, max_positions(self.checkpoint), answer_tokens)

        def check(sample: Sample) -> None:
            own(sample)
            try:
                limit(sample)
            except RowError as error:
                raise RowError(error.reason, f"for the teacher {self.source.label}: {error.detail}") from None
            answered = sample if sample.is_answered else sample.answered(_ANSWER)
            theirs, ours = (answer_ids(answered, each, answer_tokens) for each in (self.processor, processor))
            if theirs != ours:
                raise CheckpointError(
                    f"the teacher {self.source.label} tokenises an answer differently from {folder}: {theirs[:8]} "
                    f"instead of {ours[:8]}; expected a checkpoint with the same tokenizer, and a chat template that "
                    "begins and ends answers in the same way"
                )

        return check

    def load(self, dtype: str, recipe: CalibrationRecipe, device: str) -> Teacher:
        """Load it without any adapter, quantised if the calibrated model is."""
        with in_use(self.checkpoint.path):
            model = load_frozen(self.checkpoint, self.pyramid, recipe.load_in, dtype, device_map=device)
        return Teacher(model.requires_grad_(False), self.processor, recipe.answer_tokens, self.name)

    def _validate_vocabulary(self, ours: dict[str, int], folder: Path) -> None:
        theirs: dict[str, int] = self.processor.tokenizer.get_vocab()
        if different := {token for token, _ in theirs.items() ^ ours.items()}:
            token = min(different, key=lambda each: (theirs.get(each, ours.get(each, 0)), each))
            there, here = (f"id {ids[token]}" if token in ids else "missing" for ids in (theirs, ours))
            raise CheckpointError(
                f"the teacher {self.source.label} has another vocabulary than {folder}: {len(different)} tokens differ,"
                f" such as {token!r}, {there} there and {here} here; expected a checkpoint with the same tokenizer"
            )


def _open_original(source: Source) -> tuple[Checkpoint, LlavaLayout]:
    """Open a model that has no pyramid, checked as `convert` does, as if it had one without sites."""
    opened = open_source(source.path)
    if not isinstance(opened, Copied):
        raise CheckpointError(
            f"the teacher {source.label} is not in Hugging Face's layout in safetensors: `dpn convert` it, and pass "
            "the folder that this writes as --teacher"
        )
    family = Family.of(opened.checkpoint.config)
    config = opened.checkpoint.config | {
        "model_type": family.converted_type,
        "architectures": [family.architecture],
        "pyramid": PyramidConfig(sites=()).to_dict(),
    }
    checkpoint = replace(opened.checkpoint, config=config)
    layout = LlavaLayout.of(checkpoint)
    check_complete(checkpoint, layout, added={})
    with TemporaryDirectory() as name:
        opened.write_side_files(Path(name))
        complete_processor(checkpoint, layout).write(Path(name))
        write_json(Path(name, "config.json"), without_code(config))
        try_out(Path(name), layout, source.path)
    return checkpoint, layout
