"""The original LLaVA layout (`LlavaLlamaForCausalLM`): how it becomes Hugging Face's.

Config, names and tokenizer differ; the vision tower is a repository of its own, unless a fine-tune has saved it along
(as LLaVA-HR has); `<image>` and `<pad>` are no tokens yet. A linear projector becomes the first of the two layers that
transformers expects: the second is the identity, which changes no value.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_cli.checkpoint.headers import QUANTISED, TORCH_DTYPES
from dpn_cli.checkpoint.layout import without_window
from dpn_cli.checkpoint.side_files import copy_side_file, is_licence, side_files
from dpn_cli.checkpoint.template import ChatTemplate
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.conversion.hr import HrTower
from dpn_cli.conversion.rewriting import Planned, Rewritten
from dpn_cli.conversion.tokenizer import IMAGE_TOKEN, PAD_TOKEN, Words, chat_template, write_processor
from dpn_cli.conversion.tower import ClipTower, Tower
from dpn_cli.conversion.vocabulary import MULTIPLE, Vocabulary
from dpn_cli.conversion.weights import Weights
from dpn_cli.errors import CheckpointError
from dpn_cli.families.tensors import COMPUTED
from dpn_cli.families.text import OPTIONAL_SIZES, ORIGINALS, REQUIRED_SIZES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_EMBEDDING, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_STORED_EMBEDDING, _STORED_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_RENAMES = (
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
_PROJECTORS = {
    "linear": (("model.mm_projector.", "multi_modal_projector.linear_1."),),
    "mlp2x_gelu": (
        ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ),
}
# What the text model's config takes over; all else is LLaVA's, or belongs to one version of transformers.
_TEXT_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "hidden_act", "initializer_range", "sliding_window",
)  # fmt: skip
# Values of LLaVA's own config keys that LLaVA-1.5 and LLaVA-HR have; None stands for a missing key.
_ONLY: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": (None, *_PROJECTORS),
    "mm_vision_select_feature": (None, "patch"),
    "mm_use_im_start_end": (None, False),
    "image_aspect_ratio": (None, "pad", "square"),
    "mm_patch_merge_type": (None, "flat"),
    "is_multipath_encoder": (None, False, True),
}


_OTHER_TOWER = (
    "config.json says that the vision tower was trained (unfreeze_mm_vision_tower), but the checkpoint lacks it. "
    "It is read from {}; if the trained one is elsewhere, give it as --vision-tower."
)
_OTHER_TEMPLATE = (
    "The chat template in {} is not taken: prompts are written as LLaVA-1.5 was trained (USER: … ASSISTANT:), unless "
    "--chat-template gives another."
)


def is_original(config: Mapping[str, Any]) -> bool:
    """Say whether a config.json is one of the original layout; its model type is no sign."""
    return "mm_vision_tower" in config or _architecture(config) in ORIGINALS


def rewrite_original(
    original: dict[str, Any],
    weights: Weights,
    vision_tower: str | None = None,
    router_token: str | None = None,
    prepooling: int = 1,
    apart: Collection[str] = (),
) -> tuple[Rewritten, "PreTrainedTokenizerFast"]:
    """Take a LLaVA in the original layout.

    Args:
        original: the checkpoint's config.json, which `validate_original` has accepted.
        weights: the checkpoint's tensors.
        vision_tower: folder or hub id of the CLIP model; by default the one that config.json names.
        router_token: the last token of the vocabulary, which makes room for `<image>`: it moves after the new ones
            and ends every question about an image.
        prepooling: side of the squares of tower features that become one visual token.
        apart: names of tensors that LLaVA does not have and the caller takes care of.

    Returns:
        The checkpoint, and its tokenizer.

    Raises:
        CheckpointError: if it is damaged or incomplete, or there is no vision tower.
        MissingExtraError: if its tokenizer needs packages that are not installed.
    """
    folder = weights.folder
    tower = _find_tower(original, weights, vision_tower)
    words = Words.of(folder)
    tokens, vocabulary = _grow(words, _num_rows(weights), router_token, folder)
    tokenizer = words.tokenizer(tokens)
    config, notes = without_window(_config(original, tower, vocabulary, tokenizer, weights, prepooling))
    unused = {*tower.unused, *({_STORED_HEAD} if config["tie_word_embeddings"] else ())} & weights.tensors.keys()
    if unused:
        notes = (*notes, f"Tensors that nothing uses are left out: {len(unused)}, such as {min(unused)}.")
    projector = original.get("mm_projector_type") or "linear"
    planned = _plan(weights, config, vocabulary, tower, {*apart, *unused}, projector)
    if not any(name.startswith("vision_tower.") for name in planned):
        planned |= tower.planned()
        if original.get("unfreeze_mm_vision_tower") and vision_tower is None:
            notes = (*notes, _OTHER_TOWER.format(original["mm_vision_tower"]))
    with suppress(CheckpointError):  # of there being none
        notes = (*notes, _OTHER_TEMPLATE.format(ChatTemplate.find(folder).path.name))

    def write_side_files(stage: Path) -> None:
        for file in side_files(folder):
            if is_licence(file.name):
                copy_side_file(file, stage)
        text, vision = config["text_config"], config["vision_config"]
        ids = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(stage / "generation_config.json", ids)
        template = chat_template(router_token)
        write_processor(
            stage,
            tokenizer,
            template,
            vision["image_size"],
            vision["patch_size"] * prepooling,
            tower.normalisation(),
            pad_to_square=original.get("image_aspect_ratio") == "pad",
            strategy=config["vision_feature_select_strategy"],
        )

    return Rewritten.of(folder, original, config, planned, write_side_files, (*weights.notes, *notes)), tokenizer


def _architecture(config: Mapping[str, Any]) -> str:
    """Return the first architecture that a config.json names."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def validate_original(config: Mapping[str, Any], folder: Path) -> None:
    """Check that a config.json of the original layout is a LLaVA's.

    Raises:
        CheckpointError: if it is not; gives the first reason.
    """
    if _architecture(config) not in ORIGINALS:
        raise CheckpointError(
            f"{folder} is a {_architecture(config)!r} in the original LLaVA layout: expected one of "
            f"{', '.join(ORIGINALS)}"
        )
    for key, allowed in _ONLY.items():
        if config.get(key) not in allowed:
            expected = " or ".join(str(value) for value in allowed if value is not None)
            raise CheckpointError(
                f"{folder}: config.json has {key} {config[key]!r}, which neither LLaVA-1.5 nor LLaVA-HR has: expected "
                f"{expected}"
            )
    if "quantization_config" in config:
        raise CheckpointError(QUANTISED.format(folder=folder))
    for key in (*REQUIRED_SIZES, *(key for key in OPTIONAL_SIZES if config.get(key) is not None)):
        if type(config.get(key)) is not int or config[key] < 1:
            raise CheckpointError(
                f"{folder}: config.json has {config.get(key)!r} as {key}, so the model's sizes are unknown"
            )
    layer = config.get("mm_vision_select_layer", -2)
    if type(layer) is not int:
        raise CheckpointError(f"{folder}: config.json has {layer!r} as mm_vision_select_layer, expected a number")


def _find_tower(config: Mapping[str, Any], weights: Weights, vision_tower: str | None) -> Tower:
    if config.get("is_multipath_encoder"):
        return HrTower.of(weights, config, vision_tower)
    folder = weights.folder
    name = vision_tower or config.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder} does not say which vision tower it needs: pass --vision-tower PATH|ID")
    try:
        return ClipTower.find(name)
    except CheckpointError as error:
        if vision_tower is not None:
            raise
        raise CheckpointError(f"{folder} needs the vision tower {name} (or another --vision-tower): {error}") from error


def _num_rows(weights: Weights) -> int:
    if _STORED_EMBEDDING not in weights.tensors:
        raise CheckpointError(
            f"{weights.folder} has no tensor {_STORED_EMBEDDING}: it holds only a part of a model (a projector, or an "
            "adapter to be merged first)"
        )
    return weights.tensors[_STORED_EMBEDDING].shape[0]


def _grow(words: Words, num_rows: int, router_token: str | None, folder: Path) -> tuple[list[str], Vocabulary]:
    """Return the added tokens of the new vocabulary, in order, and where the rows of the old one go."""
    start = words.num_words()
    added = [words.added[i] for i in sorted(words.added) if i >= start]
    if sorted(i for i in words.added if i >= start) != list(range(start, start + len(added))):
        raise CheckpointError(
            f"{folder}: the ids of the added tokens have gaps; expected them to follow id {start - 1}"
        )
    if start + len(added) > num_rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {start + len(added)} tokens, but the embedding has {num_rows} rows: they do "
            "not belong together"
        )
    if router_token is not None and added[-1:] != [router_token]:
        raise CheckpointError(f"{folder}: expected {router_token} as the last token of the vocabulary")
    old = added if router_token is None else added[:-1]
    tokens = [*old, *(token for token in (IMAGE_TOKEN, PAD_TOKEN) if token not in old)]
    kept, moved = num_rows, {}
    if router_token is not None:
        kept, moved = start + len(old), {start + len(tokens): start + len(old)}
        tokens.append(router_token)
    rows = max(kept, start + len(tokens))
    return tokens, Vocabulary(-(-rows // MULTIPLE) * MULTIPLE, kept, moved)


def _config(
    original: Mapping[str, Any],
    tower: Tower,
    vocabulary: Vocabulary,
    tokenizer: "PreTrainedTokenizerFast",
    weights: Weights,
    prepooling: int,
) -> dict[str, Any]:
    """Return config.json in Hugging Face's layout."""
    text = {key: original[key] for key in _TEXT_KEYS if key in original}
    dtype = original.get("torch_dtype") or TORCH_DTYPES[weights.tensors[_STORED_EMBEDDING].dtype]
    linear = (original.get("mm_projector_type") or "linear") == "linear"
    grid = tower.config["image_size"] // tower.config["patch_size"] // prepooling
    tied = bool(original.get("tie_word_embeddings", False))
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "image_seq_length": grid**2,
        "projector_hidden_act": "linear" if linear else "gelu",
        **tower.features(original),
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "text_config": text
        | {
            "model_type": ORIGINALS[_architecture(original)].model_type,
            "vocab_size": vocabulary.size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": tied,
            "torch_dtype": dtype,
        },
        "vision_config": tower.config,
    }


def _plan(
    weights: Weights,
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
    tower: Tower,
    apart: Collection[str],
    projector: str,
) -> dict[str, Planned]:
    """Return every tensor of a folder by its new name, the vocabulary grown and the projector complete."""
    planned: dict[str, Planned] = {}
    for name in weights.tensors:
        if name not in apart and not name.endswith(COMPUTED):
            new = tower.renamed(name) or _rename(name, (*_RENAMES, *_PROJECTORS[projector]), weights.folder)
            planned[new] = Planned.of(weights, name)
    embedding = planned[_EMBEDDING]
    for seed, name in enumerate((_EMBEDDING, _HEAD)):
        if (old := planned.get(name)) is not None:
            if old.shape != embedding.shape:
                raise CheckpointError(
                    f"{weights.folder}: lm_head has {list(old.shape)}, expected {list(embedding.shape)}"
                )
            read = partial(vocabulary.resized, old.read, embedding.read, seed)
            planned[name] = replace(old, shape=(vocabulary.size, *old.shape[1:]), read=read)
    if projector == "linear":
        size = config["text_config"]["hidden_size"]
        for part, shape in (("weight", (size, size)), ("bias", (size,))):
            planned[f"multi_modal_projector.linear_2.{part}"] = replace(
                embedding, shape=shape, read=partial(_identity, shape, embedding.dtype)
            )
    return planned


def _rename(name: str, renames: tuple[tuple[str, str], ...], folder: Path) -> str:
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise CheckpointError(f"{folder} holds the tensor {name!r}, which neither LLaVA-1.5 nor LLaVA-HR has")


def _identity(shape: tuple[int, ...], dtype: str) -> "torch.Tensor":
    import torch

    kind = getattr(torch, TORCH_DTYPES[dtype])
    return torch.eye(shape[0], dtype=kind) if len(shape) == 2 else torch.zeros(shape, dtype=kind)
