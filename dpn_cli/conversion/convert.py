"""Insert a pyramid into a LLaVA checkpoint without loading its weights.

The small files come first: the model that they describe is built and run once, without memory for its weights. Then
the weights are written; those in Hugging Face's layout, in safetensors, are copied byte for byte.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpn_cli.checkpoint.completeness import check_complete
from dpn_cli.checkpoint.cue import answer_cue
from dpn_cli.checkpoint.headers import WEIGHTS_KEY, Checkpoint, read_header
from dpn_cli.checkpoint.initial import initial_values
from dpn_cli.checkpoint.layout import DPE_FILE, LlavaLayout
from dpn_cli.checkpoint.licence import read_licence
from dpn_cli.checkpoint.processor import Completion, complete_processor
from dpn_cli.checkpoint.side_files import left_behind, without_code
from dpn_cli.checkpoint.source import Source, resolve_source
from dpn_cli.checkpoint.staging import check_space, check_target, on_same_disk, staged_folder
from dpn_cli.checkpoint.streams import Piece, only_finite, told, verify_bytes
from dpn_cli.checkpoint.template import ChatTemplate
from dpn_cli.checkpoint.writer import RECIPE_FILE, Placement, copy_file, write_index, write_json, write_shard
from dpn_cli.conversion.opening import Copied, Opened, open_source
from dpn_cli.conversion.original import is_original
from dpn_cli.conversion.rewriting import Written
from dpn_cli.conversion.tokenizer import IMAGE_TOKEN
from dpn_cli.errors import DpnError, RecipeError, UsageError
from dpn_cli.families.family import ALIASES, CONVERTED, DEFAULT_RECIPE, FAMILIES, Family
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.recipe import Recipe
from dpn_cli.pyramid.recipe_files import available_recipes, load_recipe
from dpn_cli.reporter import SILENT, Reporter

IMPORTED = "imported"  # in the place of a recipe's name


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, or would do.

    Attributes:
        source: the model that is converted.
        output: the folder to write.
        recipe: the recipe's name, or `imported` where the source had a pyramid.
        pyramid: the pyramid, as stored in config.json.
        layout: the layout of the source's decoder.
        added: shapes of the new tensors, by full name.
        base_bytes: bytes of the model's tensors without the pyramid.
        placement: how those tensors come into the output: as the source's files, `copied`, hard-`linked` or `cloned`
            (reflinks), or `rewritten` in Hugging Face's layout.
        notes: Notes for the user on the conversion.
    """

    source: Source
    output: Path
    recipe: str
    pyramid: PyramidConfig
    layout: LlavaLayout
    added: dict[str, tuple[int, ...]]
    base_bytes: int
    placement: Placement
    notes: tuple[str, ...]

    @property
    def added_parameters(self) -> int:
        """Return the number of new parameters."""
        return sum(math.prod(shape) for shape in self.added.values())


def convert(
    model: str,
    recipe: Recipe | None = None,
    output: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    vision_tower: str | None = None,
    link: bool = False,
    check_values: bool = False,
    verify: bool = False,
    chat_template: Path | None = None,
    reporter: Reporter = SILENT,
) -> Conversion:
    """Write a copy of a LLaVA whose decoder is a pyramid; it gives the source's logits until calibrated.

    Shards in safetensors are copied byte for byte; the new tensors get a shard of their own.

    Args:
        model: a folder, an alias, or a hub id.
        recipe: the pyramid; by default the one that fits the model.
        output: the folder to write; by default `./NAME-dpn`.
        force: replace an output that dpn wrote before.
        dry_run: check everything and write nothing.
        vision_tower: folder or hub id of the CLIP model, for a checkpoint in the original LLaVA layout; by default the
            one that its config.json names.
        link: let shards share their bytes with the source (reflinks, else hard links) where the file system can.
        check_values: search the source for NaN and infinite values first.
        verify: afterwards read everything back from the disk and compare it with the source, byte by byte.
        chat_template: a file with a Jinja template, to use in place of the source's.
        reporter: is told how far the work is.

    Raises:
        CheckpointError: if the model is missing, damaged, or not a LLaVA that can have a pyramid, or its processor
            belongs to another one.
        RecipeError: if the recipe does not fit the model's depth, or the source has a pyramid of its own.
        UsageError: if the output exists or overlaps the source.
        MissingExtraError: if the source's tokenizer needs packages that are not installed.
    """
    source = resolve_source(model)
    opened = open_source(source.path, vision_tower)
    if opened.pyramid is not None and recipe is not None:
        raise RecipeError(f"{source.path} has a pyramid of its own, which is imported: leave the recipe out")
    recipe = recipe or load_recipe(default_recipe(source, opened.source_config))
    checkpoint = opened.checkpoint
    layout = LlavaLayout.of(checkpoint)
    check_complete(checkpoint, layout, added={})
    completion = _completion(source.path, opened, layout, chat_template)
    pyramid = opened.pyramid or recipe.pyramid_config(layout.shape.num_layers)
    if pyramid.router.hidden_ratio > layout.shape.hidden_size:
        raise RecipeError(f"recipe {recipe.name}: hidden_ratio {pyramid.router.hidden_ratio} leaves no router width")
    conversion = Conversion(
        source=source,
        output=default_output(source) if output is None else output,
        recipe=IMPORTED if opened.pyramid else recipe.name,
        pyramid=pyramid,
        layout=layout,
        added=layout.added_tensors(pyramid),
        base_bytes=checkpoint.nbytes,
        placement="rewritten" if not isinstance(opened, Copied) else "linked" if link else "copied",
        notes=(*opened.notes, *completion.notes(), *left_behind(source.path)),
    )
    check_target(conversion.output, force, CONVERTED, source.path)
    from dpn_cli.inference.trial import try_out  # imports torch: what needs none has been refused

    with TemporaryDirectory() as name:
        small_files = Path(name)
        _write_small_files(small_files, opened, conversion, recipe, completion)
        try_out(small_files, layout, source.path)
        if not dry_run:
            check_space(conversion.output, _needed_bytes(opened, conversion))
        if check_values:
            _check_values(opened, reporter)
        if dry_run:
            return conversion
        with staged_folder(conversion.output, force, CONVERTED, source.path, reporter) as stage:
            written = _write(stage, small_files, opened, conversion, reporter)
            if verify and written.placement != "linked":  # a hard link is the very same file
                with reporter.copying("verifying", sum(tensor.nbytes for tensor in written.tensors)) as advance:
                    verify_bytes(stage, written.tensors, lambda tensor: opened.original(tensor.name), advance)
    return replace(conversion, placement=written.placement)


def default_output(source: Source) -> Path:
    """Return the folder that a conversion is written to by default."""
    return Path(f"{source.name}-dpn")


def default_recipe(source: Source, config: Mapping[str, Any]) -> str:
    """Return the name of the recipe made for a model, or, by its config.json, of its family's."""
    by_origin = {repo_id: alias for alias, repo_id in ALIASES.items()}
    name = by_origin.get(source.origin, source.name)
    if name in available_recipes():
        return name
    family = FAMILIES.get(str(config.get("model_type")))
    return family.recipe if family else DEFAULT_RECIPE


def _check_values(opened: Opened, reporter: Reporter) -> None:
    tensors = {**opened.checkpoint.tensors, **opened.dpe}
    with reporter.copying("checking values", sum(tensor.nbytes for tensor in tensors.values())) as advance:
        for name, tensor in tensors.items():
            for _ in told(only_finite(opened.original(name), tensor, opened.origin(name)), advance):
                pass


def _needed_bytes(opened: Opened, conversion: Conversion) -> int:
    """Return the space that a conversion takes; what can be linked takes none."""
    added = 4 * conversion.added_parameters
    origins = {opened.origin(name) for name in opened.checkpoint.tensors}
    if conversion.placement == "linked" and all(on_same_disk(file, conversion.output) for file in origins):
        return added
    return conversion.base_bytes + added


def _completion(source: Path, opened: Opened, layout: LlavaLayout, chat_template: Path | None) -> Completion:
    """Return what the source's processor lacks; that of the original layout is written anew, and whole."""
    template = None if chat_template is None else ChatTemplate.read(chat_template)
    if not is_original(opened.source_config):
        return complete_processor(opened.checkpoint, layout, template)
    if template is not None:
        template.validate(IMAGE_TOKEN, {})
        if opened.pyramid is not None and opened.pyramid.router.token_id is not None:
            raise UsageError(f"the routers of {source} read a token of its chat template: leave --chat-template out")
    return Completion(template=template)


def _write_small_files(
    folder: Path, opened: Opened, conversion: Conversion, recipe: Recipe, completion: Completion
) -> None:
    """Write everything but the weights and their index."""
    opened.write_side_files(folder)
    completion.write(folder)
    if opened.pyramid is None:
        write_json(folder / RECIPE_FILE, recipe.to_dict())
    write_json(folder / "config.json", _config(opened, conversion, conversion.pyramid))


def _write(stage: Path, small_files: Path, opened: Opened, conversion: Conversion, reporter: Reporter) -> Written:
    """Write the folder; return what of it comes from the source."""
    for file in small_files.iterdir():
        copy_file(file, stage / file.name)
    pyramid = replace(conversion.pyramid, answer_cue=answer_cue(stage))
    write_json(stage / "config.json", _config(opened, conversion, pyramid))
    written = opened.write_weights(stage, conversion.placement == "linked", reporter)
    _write_dpe(stage / DPE_FILE, opened, conversion)
    tensors = [*written.tensors, *read_header(stage / DPE_FILE).values()]
    write_index(stage, tensors)
    _verify(stage, opened.checkpoint, conversion)
    return replace(written, tensors=tensors) if opened.dpe else written


def _config(opened: Opened, conversion: Conversion, pyramid: PyramidConfig) -> dict[str, Any]:
    config = opened.checkpoint.config
    kept = {key: value for key, value in without_code(config).items() if key not in {"_name_or_path", WEIGHTS_KEY}}
    family = Family.of(config)
    return (
        kept
        | read_licence(conversion.source.path, opened.source_config)
        | {
            "model_type": family.converted_type,
            "architectures": [family.architecture],
            "base_model": conversion.source.reference,
            "pyramid": pyramid.to_dict(),
        }
    )


def _write_dpe(path: Path, opened: Opened, conversion: Conversion) -> None:
    """Write the pyramid's tensors, in pieces: the imported ones, or those of before any calibration."""
    added = conversion.added
    content: Iterable[Piece] = (values.data for values in initial_values(added))
    if opened.dpe:
        content = chain.from_iterable(map(opened.original, added))
    write_shard(path, {name: ("F32", shape) for name, shape in added.items()}, content, {"format": "pt"})


def _verify(stage: Path, checkpoint: Checkpoint, conversion: Conversion) -> None:
    """Reopen what was written: every tensor must be there, in its shape and dtype."""
    written = Checkpoint.open(stage)
    expected = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
    expected |= {name: ("F32", shape) for name, shape in conversion.added.items()}
    if {name: (t.dtype, t.shape) for name, t in written.tensors.items()} != expected:
        raise DpnError(f"{conversion.output}: the written tensors are not the expected ones; please report this")
    if lacking := complete_processor(written, LlavaLayout.of(written)).summary():
        raise DpnError(f"{conversion.output}: the written processor lacks {lacking}; please report this")
