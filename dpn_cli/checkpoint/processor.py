"""Do the processor, tokenizer and chat template of a folder belong to its model? No torch.

transformers loads a processor without a look at the model: a setting that is missing, or another model's, shows when
the first image is encoded, or never. Here what config.json implies is completed, and what contradicts it refused.
Where a value is looked for, and what stands in for it, is as in transformers 5.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpn_cli.checkpoint.encoding import validate_encoding
from dpn_cli.checkpoint.headers import (
    IMAGES_FILE,
    PROCESSOR_FILE,
    TOKENIZER_CONFIG_FILE,
    VIDEOS_FILE,
    Checkpoint,
    read_json_if_there,
)
from dpn_cli.checkpoint.layout import LlavaLayout
from dpn_cli.checkpoint.side_files import copy_side_file, copy_side_files
from dpn_cli.checkpoint.template import ChatTemplate
from dpn_cli.checkpoint.tokens import DEFAULT_IMAGE_TOKEN, Tokens
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.errors import CheckpointError
from dpn_cli.families.family import FAMILIES, IMAGE_PROCESSORS, Family
from dpn_cli.families.vision import VISION_TOWERS
from dpn_cli.limits import MAX_RESIZED
from dpn_cli.pyramid.tiling import DEFAULT_ASPECT_RATIO, RESOLUTIONS


def _is_number(value: Any, above: float = -math.inf) -> bool:
    return type(value) in (int, float) and above < value < math.inf


def _has_channels(value: Any, above: float = -math.inf) -> bool:
    channels = value if isinstance(value, list) and len(value) == 3 else [value]
    return all(_is_number(channel, above) for channel in channels)


# What can be any of many values: which switch turns its use on, whether a value will do, and what will, in words.
_FREE: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "resample": ("do_resize", lambda value: type(value) is int and 0 <= value < 6, "a filter of Pillow, 0 to 5"),
    "rescale_factor": ("do_rescale", lambda value: _is_number(value, above=0), "a positive number"),
    "image_mean": ("do_normalize", _has_channels, "one number or three"),
    "image_std": ("do_normalize", lambda value: _has_channels(value, above=0), "one positive number or three"),
}

_STRATEGY = "vision_feature_select_strategy"

Place = tuple[str, ...]  # a file, and the keys that lead to a value in it

_AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # classes that take tokenizer.json as it is

IMAGES_PLACE: Place = (PROCESSOR_FILE, "image_processor")  # or a file of its own


@dataclass(frozen=True)
class Completion:
    """What a folder's processor lacks.

    Attributes:
        settings: the values that config.json implies, by place.
        template: the chat template to write; None if the processor finds its own.
        replaced: the values, by place, that transformers takes for the original in place of those in its folder.
    """

    settings: Mapping[Place, Any] = field(default_factory=dict)
    template: ChatTemplate | None = None
    replaced: Mapping[Place, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """Return what is completed, for a message; empty if nothing is."""
        parts = [f"{'.'.join(keys)} {value!r} in {file}" for (file, *keys), value in self.settings.items()]
        return ", ".join([*parts, *([f"the chat template of {self.template.path.name}"] if self.template else [])])

    def notes(self) -> tuple[str, ...]:
        """Return what to tell the user about it."""
        return (f"Missing, and completed: {self.summary()}.",) if self.summary() else ()

    def write(self, folder: Path) -> None:
        """Complete the files of a folder, which must be our own."""
        for (file, *keys), value in {**self.settings, **self.replaced}.items():
            data = inner = read_json_if_there(folder / file)
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = value
            write_json(folder / file, data)
        if self.template is not None:
            self.template.write(folder)

    @contextmanager
    def applied(self, folder: Path) -> Iterator[Path]:
        """Yield a folder whose processor is complete: the very one, or a copy of its small files."""
        if not self.summary() and not self.replaced:
            yield folder
            return
        with TemporaryDirectory() as name:
            copy_side_file(folder / "config.json", Path(name))
            copy_side_files(folder, Path(name))
            self.write(Path(name))
            yield Path(name)


@dataclass(frozen=True)
class _Setting:
    """A value of the processor that config.json implies, or that transformers needs.

    Attributes:
        place: the file, and the keys that lead to the value.
        expected: the value that belongs there.
        assumed: the value that transformers assumes if the key is missing.
        fits: says whether another value will do.
        needs: Values that are accepted, in words; empty if config.json implies the value.
    """

    place: Place
    expected: Any
    assumed: Any = None
    fits: Callable[[Any], bool] = lambda found: False
    needs: str = ""


def complete_processor(checkpoint: Checkpoint, layout: LlavaLayout, template: ChatTemplate | None = None) -> Completion:
    """Check the processor, tokenizer and chat template of a folder against its config, before anything is done with it.

    Args:
        checkpoint: the checkpoint in Hugging Face's layout, converted or not.
        layout: the checkpoint's layout.
        template: a template to use in place of the folder's own.

    Returns:
        What is missing and follows from config.json.

    Raises:
        CheckpointError: if a key contradicts config.json, or cannot be completed; names the file and the key.
        UsageError: if the template that is given does not show images.
    """
    template = template or ChatTemplate.find(checkpoint.path)
    completion, image_token, special = _hold(checkpoint, layout, template)
    validate_encoding(checkpoint.path)
    template.validate(image_token, special)
    return completion


def inspect_processor(checkpoint: Checkpoint, layout: LlavaLayout) -> Completion:
    """Do as `complete_processor` does, but for what takes long, to import transformers: the template is not tried."""
    return _hold(checkpoint, layout, ChatTemplate.find(checkpoint.path))[0]


def _hold(
    checkpoint: Checkpoint, layout: LlavaLayout, template: ChatTemplate
) -> tuple[Completion, str, Mapping[str, str]]:
    """Return what is missing, the placeholder of an image, and the tokenizer's special tokens."""
    folder, config = checkpoint.path, checkpoint.config
    files = _Files(folder)
    tokens = Tokens.of(folder)
    tokens.validate_ids(config, layout.shape.vocab_size)
    settings = [*_processor_settings(files, config, layout), *_image_settings(files, config, layout)]
    missing = {setting.place: setting.expected for setting in settings if files.lacks(setting)}
    image_token, is_implied = tokens.image_token(config, files.processor.get("image_token"))
    if is_implied and files.processor.get("image_token", DEFAULT_IMAGE_TOKEN) != image_token:
        missing[PROCESSOR_FILE, "image_token"] = image_token
    missing |= tokens.missing(config, image_token)
    replaced: dict[Place, Any] = {}
    named = files.data[TOKENIZER_CONFIG_FILE,].get("tokenizer_class")
    if Family.of(config).plain_tokenizer and named not in _AS_IT_IS:
        replaced[TOKENIZER_CONFIG_FILE, "tokenizer_class"] = _AS_IT_IS[0]
    return Completion(missing, None if template.is_found else template, replaced), image_token, tokens.special


class _Files:
    """The JSON files of a folder's processor; a file that is not there is empty.

    Attributes:
        images_place: the place of the image processor's settings.
        data: settings by the place of their group, in the order in which transformers asks for the class.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        processor = read_json_if_there(folder / PROCESSOR_FILE)
        images, self.images_place = processor.get("image_processor"), IMAGES_PLACE
        if not isinstance(images, dict):
            images, self.images_place = read_json_if_there(folder / IMAGES_FILE), (IMAGES_FILE,)
        if not images:
            raise CheckpointError(
                f"{folder} has neither {IMAGES_FILE} nor an image_processor in {PROCESSOR_FILE}, so it is unknown "
                "how its images are prepared: copy them from the model that it was made from"
            )
        tokenizer = read_json_if_there(folder / TOKENIZER_CONFIG_FILE)
        self.data: dict[Place, dict[str, Any]] = {
            (PROCESSOR_FILE,): processor, self.images_place: images, (TOKENIZER_CONFIG_FILE,): tokenizer,
        }  # fmt: skip

    @property
    def processor(self) -> dict[str, Any]:
        """The processor's own settings."""
        return self.data[PROCESSOR_FILE,]

    @property
    def images(self) -> dict[str, Any]:
        """The image processor's settings."""
        return self.data[self.images_place]

    @property
    def has_videos(self) -> bool:
        """Whether transformers finds settings for videos."""
        own = self._folder / VIDEOS_FILE, self._folder / IMAGES_FILE
        return isinstance(self.processor.get("video_processor"), dict) or any(file.is_file() for file in own)

    def lacks(self, setting: _Setting) -> bool:
        """Say whether a setting has to be completed.

        Raises:
            CheckpointError: if it has a value that contradicts config.json.
        """
        (file, *keys), group = setting.place, self.data[setting.place[:-1]]
        found = group.get(keys[-1], setting.assumed)
        if found is not None and (found == setting.expected or setting.fits(found)):
            return False
        if group.get(keys[-1]) is None:
            return True
        says = f"{self._folder / file} has the {'.'.join(keys)} {found!r}"
        if setting.needs:
            raise CheckpointError(
                f"{says}, expected {setting.needs} (by default {setting.expected!r}): correct it, or take the file "
                "from the model that this one was made from"
            )
        raise CheckpointError(
            f"{says}, config.json implies {setting.expected!r}: they do not belong together, take both from one model "
            "or correct the one that is wrong"
        )


def _processor_settings(files: _Files, config: dict[str, Any], layout: LlavaLayout) -> Iterator[_Setting]:
    """Yield what the processor itself is told: above all, how many tokens an image has."""
    family, own = Family.of(config), files.processor
    place = next((place for place, group in files.data.items() if group.get("processor_class")), (PROCESSOR_FILE,))
    others = [each.processor for each in FAMILIES.values()]  # a class of foreign code is refused on loading
    yield _Setting((*place, "processor_class"), family.processor, fits=lambda found: found not in others)
    if family.counts_tokens:
        key, base, assumed = "num_image_tokens", layout.grid[0] * layout.grid[1], None
        ratio = config.get("vision_aspect_ratio", DEFAULT_ASPECT_RATIO)
        yield _Setting((PROCESSOR_FILE, "vision_aspect_ratio"), ratio, DEFAULT_ASPECT_RATIO)
    else:
        key, base, assumed = "num_additional_image_tokens", 0, 0
        yield _Setting((PROCESSOR_FILE, "patch_size"), layout.patch)
    if family.video_processor and not files.has_videos:
        videos = {"video_processor_type": family.video_processor, "size": _square(layout.pixels)}
        yield _Setting((PROCESSOR_FILE, "video_processor"), videos)
    strategy = VISION_TOWERS[config["vision_config"]["model_type"]].select_strategy
    strategies = [tower.select_strategy for tower in VISION_TOWERS.values()]  # no set: a file may hold a dict

    def count(strategy: Any) -> int:
        return base + (strategy == "default")  # the class token, which that strategy takes away again

    yield _Setting(
        (PROCESSOR_FILE, _STRATEGY),
        strategy,
        fits=lambda found: found in strategies and own.get(key, assumed) == count(found),
    )
    yield _Setting((PROCESSOR_FILE, key), count(own.get(_STRATEGY) or strategy), assumed)


def _image_settings(files: _Files, config: dict[str, Any], layout: LlavaLayout) -> Iterator[_Setting]:
    """Yield what the image processor is told: the size of what it hands to the vision tower."""
    family, images, side = Family.of(config), files.images, layout.pixels
    older = str(images.get("feature_extractor_type") or family.image_processor)
    stated = images.get("image_processor_type") or older.replace("FeatureExtractor", "ImageProcessor")
    kind = str(stated).removesuffix("Fast").removesuffix("Pil")
    cutters = {each.image_processor for each in FAMILIES.values() if each.cuts_images}
    alike = {family.image_processor} if family.cuts_images else IMAGE_PROCESSORS.keys() - cutters
    yield _Setting(
        (*files.images_place, "image_processor_type"),
        family.image_processor,
        images.get("feature_extractor_type"),
        fits=lambda found: kind in alike,
    )
    assumed = IMAGE_PROCESSORS.get(kind, IMAGE_PROCESSORS[family.image_processor])
    given = assumed | {key: value for key, value in images.items() if value is not None}
    yield from _free_settings(files.images_place, assumed, given)
    square = _square(side)
    crops = given.get("do_center_crop")
    if not (crops or (layout.tiling and layout.tiling.cuts_several)):  # nothing else gives every image one size
        yield _Setting((*files.images_place, "do_resize"), True, True)
    if crops or (family.cuts_images and images.get("crop_size") is not None):
        crop = assumed.get("crop_size", square)
        yield _Setting((*files.images_place, "crop_size"), square, crop, lambda found: _side(found) == side)

    def fits(size: Any) -> bool:
        if crops and not family.cuts_images:
            return side <= _side(size) <= MAX_RESIZED * side  # the middle is cut out
        is_square = isinstance(size, dict) and "height" in size
        pads = "do_pad" in assumed and given["do_pad"]
        return _side(size) == side and bool(is_square or pads or family.cuts_images)

    edge = {"shortest_edge": side}
    yield _Setting((*files.images_place, "size"), edge if crops else square, assumed["size"], fits)
    if layout.tiling is not None:
        resolutions = [list(pair) for pair in layout.tiling.resolutions]
        yield _Setting((*files.images_place, "image_grid_pinpoints"), resolutions, RESOLUTIONS[family.model_type])


def _free_settings(place: Place, assumed: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[_Setting]:
    """Yield what config.json says nothing of: the switches, and the values that they turn on."""
    for key, value in assumed.items():
        if key.startswith("do_"):
            yield _Setting((*place, key), value, value, lambda found: found in (True, False), "true or false")
        elif key in _FREE and given[_FREE[key][0]]:
            yield _Setting((*place, key), value, value, *_FREE[key][1:])


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _side(size: Any) -> int:
    """Return the side of the square that a size means, or of the shortest edge; 0 for another kind of size."""
    if isinstance(size, dict):
        stated = {key: size[key] for key in ("height", "width", "shortest_edge") if size.get(key) is not None}
        known = stated.keys() in ({"height", "width"}, {"shortest_edge"})
        size, *others = stated.values() if known else (None,)
        size = size if others in ([], [size]) else None
    return size if type(size) is int else 0
