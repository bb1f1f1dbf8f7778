"""Write a converted checkpoint as one compact folder that transformers loads, with or without dpn installed.

Tensors are streamed from shard to shard in small pieces: no model is loaded, and without a change of dtype no tensor
is touched (nor torch imported), but for those that healing has an adapter for: it is merged, one weight at a time.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.completeness import check_complete
from dpn_cli.checkpoint.cue import answer_cue
from dpn_cli.checkpoint.headers import DTYPES, TORCH_DTYPES
from dpn_cli.checkpoint.layout import LlavaLayout, open_converted, refuse_quantised, stored_dtype
from dpn_cli.checkpoint.locks import in_use
from dpn_cli.checkpoint.lora import Lora
from dpn_cli.checkpoint.processor import Completion, complete_processor
from dpn_cli.checkpoint.side_files import copy_side_files, left_behind
from dpn_cli.checkpoint.staging import check_space, check_target, staged_folder
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.errors import DpnError, UsageError
from dpn_cli.exporting.config import export_config, without_unused_layers
from dpn_cli.exporting.content import verify_untouched, write_weights
from dpn_cli.exporting.model_card import model_card
from dpn_cli.exporting.options import DEFAULTS, ExportOptions
from dpn_cli.exporting.plan import TEXT_MODEL, Plan, parse_size, plan_export
from dpn_cli.exporting.quantise import SCHEMES, Scheme, is_linear, quantization_config
from dpn_cli.exporting.routes import exported_pyramid, validate_calibrated
from dpn_cli.families.family import CONVERTED
from dpn_cli.modeling.code import CODE_FILE, write_code
from dpn_cli.pyramid.config import DPE_PARTS, PyramidConfig
from dpn_cli.pyramid.presets import preset_of
from dpn_cli.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes:
        source: the converted folder.
        output: the exported folder.
        pyramid: the pyramid, as stored in its config.json.
        files: the shards.
        num_tensors: number of tensors in the shards.
        nbytes: bytes of those tensors.
        dtype: the dtype that the tensors were converted to; None if they were left as they were.
        scheme: how the decoder's linear layers were quantised; None if they were not.
        num_verified: number of tensors compared with the source; None if that was not asked for.
        notes: Notes for the user on the processor, and on what was left out.
    """

    source: Path
    output: Path
    pyramid: PyramidConfig
    files: tuple[str, ...]
    num_tensors: int
    nbytes: int
    dtype: str | None
    scheme: Scheme | None
    num_verified: int | None
    notes: tuple[str, ...]


def export(
    checkpoint: Path,
    output: Path,
    options: ExportOptions = DEFAULTS,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Export:
    """Write a converted checkpoint as one compact folder: weights, code, processor and model card.

    Args:
        checkpoint: a folder that `dpn convert` wrote.
        output: the folder to write.
        options: Options of the export and its checks.
        force: whether to replace an output that dpn wrote before.
        reporter: is told how far the work is.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged, or not converted, or its processor another model's.
        UsageError: if the output exists or overlaps the checkpoint, or an option makes no sense for it.
    """
    with in_use(checkpoint):
        draft = _draft(checkpoint, options)
        plan = draft.plan
        check_target(output, force, CONVERTED, plan.source.path)
        check_space(output, plan.nbytes)
        with staged_folder(output, force, CONVERTED, plan.source.path, reporter) as stage:
            _write_side_files(stage, draft, output.resolve().name)
            write_weights(stage, plan, draft.pyramid, options.check_values, reporter)
            _reopen(stage, plan, output)
            num_verified = verify_untouched(stage, plan, reporter) if options.verify else None
    return Export(
        source=checkpoint,
        output=output,
        pyramid=draft.pyramid,
        files=tuple(plan.shards),
        num_tensors=len(plan.stored),
        nbytes=plan.nbytes,
        dtype=options.dtype,
        scheme=options.quantize,
        num_verified=num_verified,
        notes=(*draft.completion.notes(), *left_behind(checkpoint, written=(CODE_FILE,))),
    )


@dataclass(frozen=True)
class _Draft:
    """An export before anything is written."""

    plan: Plan
    config: dict[str, Any]
    layout: LlavaLayout
    pyramid: PyramidConfig
    completion: Completion


def _draft(checkpoint: Path, options: ExportOptions) -> _Draft:
    dtype, max_shard_bytes = options.dtype, parse_size(options.max_shard_size)
    source, layout, pyramid = open_converted(checkpoint)
    refuse_quantised(source)
    check_complete(source, layout, layout.added_tensors(pyramid))
    for what, choice, known in (("dtype", dtype, DTYPES), ("quantisation", options.quantize, SCHEMES)):
        if choice is not None and choice not in known:
            raise UsageError(f"unknown {what} {choice!r}: expected one of {', '.join(known)}")
    scheme = SCHEMES[options.quantize] if options.quantize else None
    completion = complete_processor(source, layout)
    converted, pyramid = pyramid, exported_pyramid(pyramid, layout, options.budget, options.static)
    if not options.uncalibrated:
        validate_calibrated(source, layout, converted, pyramid)
    lora = Lora.of(checkpoint, converted)
    if preset_of(pyramid):  # of the literature, on the original's weights
        lora = None
    if not pyramid.answer_cue:  # as in folders that earlier versions converted
        pyramid = replace(pyramid, answer_cue=answer_cue(checkpoint))
    if scheme and dtype is None:  # as on loading, where a weight is cast before it is quantised
        names = {TORCH_DTYPES[stored]: name for name, stored in DTYPES.items()}
        dtype = names.get(str(stored_dtype(source, layout)))
    config = export_config(source, layout, pyramid, dtype)
    added = pyramid.dpe_tensors(layout.shape.hidden_size)
    left_out = [f"{TEXT_MODEL}{part}" for part in DPE_PARTS if not any(name.startswith(part) for name in added)]
    if options.drop_unused:
        config, unused = without_unused_layers(config, source)
        left_out += unused
    plan = plan_export(source, dtype, scheme, lora, max_shard_bytes, tuple(left_out))
    if scheme:
        kept = [move.name for move in plan.moves if not move.scheme and is_linear(move.name, move.tensor.shape)]
        config["quantization_config"] = quantization_config(scheme, config["dtype"], kept)
    return _Draft(plan, config, layout, pyramid, completion)


def _write_side_files(stage: Path, draft: _Draft, name: str) -> None:
    copy_side_files(draft.plan.source.path, stage)
    draft.completion.write(stage)
    card = model_card(name, draft.config, draft.layout, draft.pyramid)
    write_code(stage)
    (stage / "README.md").write_text(card, encoding="utf-8")
    write_json(stage / "config.json", draft.config)


def _reopen(stage: Path, plan: Plan, output: Path) -> None:
    """Reopen what was written: every tensor must be there, in its shape and dtype."""
    written, _, _ = open_converted(stage)
    if {name: (t.dtype, t.shape) for name, t in written.tensors.items()} != plan.stored:
        raise DpnError(f"{output}: the written tensors are not the expected ones; please report this")
