"""Is this checkpoint a LLaVA that can become a pyramid, and how are its tensors named? No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import QUANTISED, TORCH_DTYPES, Checkpoint, adapter_refusal, read_config
from dpn_cli.checkpoint.locks import in_use
from dpn_cli.checkpoint.quantisation import has_shape
from dpn_cli.checkpoint.wrappers import EMBEDDING, refuse_unfinished, unwrap
from dpn_cli.errors import CheckpointError
from dpn_cli.families.family import CONVERTED, FAMILIES, Family, is_converted
from dpn_cli.families.tensors import TEXT_PREFIXES
from dpn_cli.families.text import OPTIONAL_SIZES, ORIGINALS, REQUIRED_SIZES, TEXT_MODELS
from dpn_cli.families.vision import VISION_TOWERS
from dpn_cli.limits import MAX_LABELS, MAX_TILES
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.experts import Grid
from dpn_cli.pyramid.shape import DecoderShape
from dpn_cli.pyramid.tiling import Tiling

DPE_FILE = "dpe.safetensors"  # the shard of the tensors that a conversion adds

# The sample that costs are shown for where nobody says: height and width of its image, and its text tokens.
IMAGE_SIZE = (672, 672)
TEXT_TOKENS = 64


@dataclass(frozen=True)
class LlavaLayout:
    """A LLaVA's decoder as convert and inspect need it.

    Attributes:
        text_prefix: the prefix of the decoder's tensor names, before `layers.0…`.
        text_config: the text_config, with transformers' defaults filled in.
        shape: the decoder's sizes.
        pixels: side of an image, or of a tile, in pixels.
        patch: side of the square that becomes one visual token, in pixels.
        grid: visual tokens of a whole image.
        tiling: how images are cut into tiles as well; None if they are not.
    """

    text_prefix: str
    text_config: dict[str, Any]
    shape: DecoderShape
    pixels: int
    patch: int
    grid: Grid
    tiling: Tiling | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "LlavaLayout":
        """Read the layout of a LLaVA whose config `validate_llava` has accepted.

        Raises:
            CheckpointError: if config and tensors do not belong together.
        """
        config, where = checkpoint.config, checkpoint.path
        refuse_unfinished(checkpoint.tensors, where)
        text_config = TEXT_MODELS[config["text_config"].get("model_type", "llama")].completed(config["text_config"])
        pixels, patch = _pixels(config["vision_config"], _prepooling(config), where)
        grid = (pixels // patch, pixels // patch)
        layout = cls(
            text_prefix=_text_prefix(checkpoint),
            text_config=text_config,
            shape=_shape(text_config, where),
            pixels=pixels,
            patch=patch,
            grid=grid,
            tiling=_tiling(config, grid, where),
        )
        layout._check_shapes(checkpoint)
        token: int = config.get("image_token_index", config.get("image_token_id", -1))
        if not 0 <= token < layout.shape.vocab_size:
            raise CheckpointError(
                f"{where}: config.json has the image_token_index {token}, but the vocabulary ends at "
                f"{layout.shape.vocab_size - 1}"
            )
        return layout

    def added_tensors(self, pyramid: PyramidConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that a pyramid adds, by their full name."""
        return {self.text_prefix + n: shape for n, shape in pyramid.dpe_tensors(self.shape.hidden_size).items()}

    def image_grids(self, sizes: Sequence[tuple[int, int]]) -> tuple[Grid, ...]:
        """Return the visual grids of a sample from the heights and widths of its images, in pixels."""
        if self.tiling is None:
            return (self.grid,) * len(sizes)
        cut = len(sizes) == 1 or self.tiling.cuts_several
        blocks = [self.tiling.blocks(*size) if cut else self.tiling.blocks_beside_others() for size in sizes]
        return tuple(grid for block in chain(*blocks) for grid in block)

    def _check_shapes(self, checkpoint: Checkpoint) -> None:
        """Compare the decoder's sizes with its tensors: transformers loads a bad config silently."""
        shape, prefix = self.shape, self.text_prefix
        heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        expected = {
            "layers.0.self_attn.q_proj.weight": ("num_attention_heads × head_dim", heads),
            "layers.0.self_attn.k_proj.weight": ("num_key_value_heads × head_dim", kv_heads),
            "layers.0.mlp.gate_proj.weight": ("intermediate_size", shape.intermediate_size),
            "embed_tokens.weight": ("vocab_size", shape.vocab_size),
        }
        for name, (key, rows) in expected.items():
            size = (rows, shape.hidden_size)
            tensor = checkpoint.tensors.get(prefix + name)
            found = "no such tensor" if tensor is None else str(list(tensor.shape))
            if tensor is None or not has_shape(tensor, size):
                raise CheckpointError(
                    f"{checkpoint.path}: config.json asks for {prefix}{name} of {list(size)}, which are {key} and "
                    f"hidden_size, found {found}: text_config and weights do not belong together"
                )
        stored = _num_layers(checkpoint, prefix)
        if stored != shape.num_layers:
            raise CheckpointError(
                f"{checkpoint.path}: config.json says {shape.num_layers} decoder layers, the weights have {stored}"
            )


def open_llava(folder: Path) -> tuple[Checkpoint, LlavaLayout]:
    """Open a LLaVA, converted or not, from its headers alone.

    Raises:
        CheckpointError: if it is missing, damaged, or not a LLaVA that can have a pyramid.
    """
    with in_use(folder):
        return _open(folder, completed(read_config(folder)))


def open_converted(folder: Path) -> tuple[Checkpoint, LlavaLayout, PyramidConfig]:
    """Open a LLaVA with a pyramid, from its headers alone.

    Raises:
        CheckpointError: if it is missing, damaged, or not converted.
    """
    with in_use(folder):
        config = read_config(folder)
        if not is_converted(config):
            validate_llava(config, folder)
            raise CheckpointError(f"{folder} has no pyramid yet: run `dpn convert {folder}` first")
        checkpoint, layout = _open(folder, config)
    return checkpoint, layout, read_pyramid(checkpoint, layout)


def _open(folder: Path, config: dict[str, Any]) -> tuple[Checkpoint, LlavaLayout]:
    validate_llava(config, folder)  # first: what it is says more than which file it lacks
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(adapter_refusal(folder))
    checkpoint = Checkpoint.open(folder, config)
    return checkpoint, LlavaLayout.of(checkpoint)


def stored_dtype(source: Checkpoint, layout: LlavaLayout) -> str | None:
    """Return the dtype that a checkpoint is loaded in, in torch's words: its config's, else its embedding's."""
    stored = source.tensors[f"{layout.text_prefix}embed_tokens.weight"].dtype
    config = source.config
    return config.get("dtype") or config.get("torch_dtype") or TORCH_DTYPES.get(stored)


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse an export whose weights are quantised, for work that needs the weights themselves.

    Raises:
        CheckpointError: if they are.
    """
    if "quantization_config" in checkpoint.config:
        raise CheckpointError(f"{checkpoint.path} is a quantised export: start from the folder that it was made from")


def read_pyramid(checkpoint: Checkpoint, layout: LlavaLayout) -> PyramidConfig:
    """Return a checkpoint's pyramid; without sites when it is not converted.

    Raises:
        CheckpointError: if config.json holds one that this version does not read, or that does not fit the decoder.
    """
    if "pyramid" not in checkpoint.config:
        return PyramidConfig(sites=())
    where = checkpoint.path / "config.json"
    try:
        pyramid = PyramidConfig.from_dict(checkpoint.config["pyramid"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    layers = [-2, *(site.after_layer for site in pyramid.sites), layout.shape.num_layers]
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise CheckpointError(f"{where}: pyramid sites after layers {layers[1:-1]} do not fit {layers[-1]} layers")
    return pyramid


def validate_llava(config: dict[str, Any], where: Path) -> None:
    """Check that a config describes a LLaVA whose decoder can become a pyramid.

    Raises:
        CheckpointError: if it does not; gives the first reason.
    """
    model_type = config.get("model_type")
    if "mm_vision_tower" in config or any(each in str(config.get("architectures")) for each in ORIGINALS):
        raise CheckpointError(
            f"{where} is in the original LLaVA layout: convert it with `dpn convert {where} --vision-tower PATH|ID`"
        )
    if str(model_type).removeprefix(CONVERTED) not in FAMILIES:
        kind = "another kind of vision model" if "vision_config" in config else "no vision tower"
        raise CheckpointError(
            f"{where} has model type {model_type!r} ({kind}): expected a LLaVA ({', '.join(FAMILIES)})"
        )
    for key in ("text_config", "vision_config"):
        if not isinstance(config.get(key), dict):
            raise CheckpointError(f"{where}: config.json has no {key}, so the model's sizes are unknown")
    ids = {key: config[key] for key in ("image_token_index", "image_token_id") if key in config}
    if len(ids) == 2 and len({*map(str, ids.values())}) == 2:
        stated = " and the ".join(f"{key} {value!r}" for key, value in ids.items())
        raise CheckpointError(
            f"{where}: config.json has the {stated}, which are two names for one id: keep the right one"
        )
    if type(config.get("image_token_index", config.get("image_token_id"))) is not int:
        raise CheckpointError(f"{where}: config.json has no image_token_index, so the image's place is unknown")
    for part in (config, config["text_config"], config["vision_config"]):
        if type(labels := part.get("num_labels", 0)) is not int or labels > MAX_LABELS:
            raise CheckpointError(
                f"{where}: config.json has the num_labels {labels!r}, expected at most {MAX_LABELS:,}: leave it out"
            )
    if "quantization_config" in config and not is_converted(config):
        raise CheckpointError(QUANTISED.format(folder=where))
    _validate_text(config["text_config"], where)
    _validate_vision(config, where)


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as transformers reads it: quantised by null is not at all, and a vision tower has a type."""
    if config.get("quantization_config", {}) is None:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    vision, family = config.get("vision_config"), FAMILIES.get(str(config.get("model_type")))
    if family is None or not isinstance(vision, dict) or "model_type" in vision:
        return config
    return config | {"vision_config": {"model_type": family.vision_tower, **vision}}


def without_window(config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a LLaVA's config without sliding-window attention, and what to tell the user about it.

    A pyramid cannot have a window, which would count pooled tokens. Within the window, full attention is the same: the
    model is given no more positions than that.
    """
    text = config.get("text_config")
    record = TEXT_MODELS.get(str(text.get("model_type"))) if isinstance(text, dict) else None
    if not isinstance(text, dict) or record is None or not record.has_window(text):
        return config, ()
    window, positions = record.completed(text).get("sliding_window"), text.get("max_position_embeddings")
    if type(window) is not int:
        return config, ()
    limit = min(window, positions) if type(positions) is int else window
    text = text | {"sliding_window": None, "max_position_embeddings": limit, **record.full_attention}
    note = (
        f"Its attention has a sliding window of {window} tokens, which a pyramid cannot have: it has full "
        f"attention now, which is the same up to {limit} tokens, and no positions beyond them."
    )
    return config | {"text_config": text}, (note,)


def _validate_text(text_config: dict[str, Any], where: Path) -> None:
    model_type = text_config.get("model_type", "llama")
    if not isinstance(model_type, str) or model_type not in TEXT_MODELS:
        raise CheckpointError(
            f"{where} has a language model of type {model_type!r}: expected one of {', '.join(TEXT_MODELS)}"
        )
    record = TEXT_MODELS[model_type]
    if record.has_window(text_config):
        window = record.completed(text_config).get("sliding_window")
        raise CheckpointError(f"{where} uses sliding-window attention ({window} tokens), which a pyramid cannot have")


def _validate_vision(config: dict[str, Any], where: Path) -> None:
    model_type = config["vision_config"].get("model_type")
    if not isinstance(model_type, str) or model_type not in VISION_TOWERS:
        raise CheckpointError(
            f"{where} has a vision tower of type {model_type!r}: expected one of {', '.join(VISION_TOWERS)}"
        )
    strategy = config.get("vision_feature_select_strategy", Family.of(config).select_strategy)
    expected = VISION_TOWERS[model_type].select_strategy
    if strategy != expected:
        raise CheckpointError(
            f"{where} selects the {strategy!r} features of its {model_type}, which are not a square grid: "
            f"expected {expected!r}"
        )


def _shape(text_config: dict[str, Any], where: Path) -> DecoderShape:
    given = [key for key in OPTIONAL_SIZES if text_config.get(key) is not None]
    for key in (*REQUIRED_SIZES, *given):
        if type(text_config[key]) is not int or text_config[key] < 1:
            raise impossible(where, f"text_config.{key}", text_config[key])
    return DecoderShape.from_config(text_config)


def impossible(folder: Path, key: str, value: object) -> CheckpointError:
    """Return what refuses a size in config.json."""
    return CheckpointError(
        f"{folder / 'config.json'} has the impossible {key} {value!r}, expected a whole number of at least 1"
    )


def _pixels(vision_config: dict[str, Any], prepooling: int, where: Path) -> tuple[int, int]:
    """Return the sides of an image and of a visual token."""
    vision_config = VISION_TOWERS[vision_config["model_type"]].completed(vision_config)
    image_size, patch_size = vision_config["image_size"], vision_config["patch_size"]
    for key, value in (("image_size", image_size), ("patch_size", patch_size)):
        if type(value) is not int or value < 1:
            raise impossible(where, f"vision_config.{key}", value)
    if image_size < patch_size:
        raise CheckpointError(
            f"{where / 'config.json'} has the vision_config.image_size {image_size}, less than the patch_size "
            f"{patch_size}"
        )
    return image_size, patch_size * prepooling


def _prepooling(config: dict[str, Any]) -> int:
    """Return a pyramid's prepooling; what is damaged is left to `read_pyramid`."""
    pyramid = config.get("pyramid")
    side = pyramid.get("prepooling", 1) if isinstance(pyramid, dict) else 1
    return side if type(side) is int and side > 0 else 1


def _tiling(config: dict[str, Any], grid: Grid, where: Path) -> Tiling | None:
    if not Family.of(config).cuts_images:
        return None
    try:
        tiling = Tiling.of(config, grid[0])
        tiling.blocks(1, 1)
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError):
        raise CheckpointError(
            f"{where}: config.json does not say how images are cut into tiles: expected image_size in vision_config, "
            f"image_grid_pinpoints as [height, width] pairs and, for OneVision, a vision_aspect_ratio like anyres_max_9"
        ) from None
    if any(tall * wide > MAX_TILES * tiling.pixels**2 for tall, wide in tiling.resolutions):
        raise CheckpointError(f"{where}: config.json has image_grid_pinpoints of more than {MAX_TILES} tiles")
    return tiling


def _text_prefix(checkpoint: Checkpoint) -> str:
    for prefix in TEXT_PREFIXES:
        if f"{prefix}{EMBEDDING}" in checkpoint.tensors:
            return prefix
    if found := unwrap(checkpoint.tensors)[1]:
        remedy = (
            "save the model inside the wrapper again"
            if is_converted(checkpoint.config)
            else f"`dpn convert {checkpoint.path}` takes it off"
        )
        raise CheckpointError(f"{checkpoint.path} was saved from a wrapped model, with {found} in its names: {remedy}")
    alike = next((f" but {name}" for name in checkpoint.tensors if name.endswith(EMBEDDING)), "")
    raise CheckpointError(
        f"{checkpoint.path} has no tensor {TEXT_PREFIXES[0]}{EMBEDDING} (nor {TEXT_PREFIXES[1]}…){alike}: "
        "its weights are not a LLaVA's in Hugging Face's layout"
    )


def _num_layers(checkpoint: Checkpoint, prefix: str) -> int:
    start = f"{prefix}layers."
    return len({name[len(start) :].split(".")[0] for name in checkpoint.tensors if name.startswith(start)})
