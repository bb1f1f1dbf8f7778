"""Can a converted folder run? What its small files describe is built, and run once without memory for weights.

transformers builds most of a config, a tokenizer or a generation config without a look at their values: what is wrong
shows when the first answer is generated. Here it shows before anything is written, with the file and the key.
"""

import re
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast

from dpn_cli.checkpoint.blame import Key, keys, without
from dpn_cli.checkpoint.headers import (
    GENERATION_FILE,
    IMAGES_FILE,
    PROCESSOR_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    read_json,
    read_json_if_there,
)
from dpn_cli.checkpoint.layout import LlavaLayout
from dpn_cli.checkpoint.panics import no_panic
from dpn_cli.checkpoint.template import QUESTION
from dpn_cli.checkpoint.writer import copy_file, write_json
from dpn_cli.data.encoding import VISUAL, encode
from dpn_cli.data.rendering import adds_special, chat_prompt
from dpn_cli.data.samples import Sample, Turn
from dpn_cli.errors import CheckpointError
from dpn_cli.inference.loading import build_processor, model_classes, quietly
from dpn_cli.modeling.families import MODELS
from dpn_cli.modeling.visual import GRID_INPUTS

CONFIG_FILE = "config.json"
SEARCH_S = 3.0  # of CPU time, for the key that is to blame
# What the weights confirm, and what says no more than its file does.
NEVER_BLAMED = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "image_size", "text_config", "vision_config",
}  # fmt: skip
_FLAG = "true or false", lambda value: isinstance(value, bool)
_COUNT = "a whole number of at least 1", lambda value: type(value) is int and value >= 1
_NUMBER = "a number", lambda value: type(value) in (int, float)
_KINDS: Mapping[str, tuple[str, Callable[[object], bool]]] = {"bool": _FLAG, "int": _NUMBER, "float": _NUMBER}
_STATED = re.compile(r"^ *(\w+) \(`(bool|int|float)`[,)]", re.MULTILINE)
# The settings of generation, which one greedy token does not show to be wrong, with what transformers says each must
# be; those that every command sets itself are not even read then.
SETTINGS = {key: _KINDS[kind] for key, kind in _STATED.findall(GenerationConfig.__doc__ or "")} | dict.fromkeys(
    ("num_beams", "num_return_sequences", "max_new_tokens"), _COUNT
)
# Ends what torch says of a step that looks at values, which a model without weights has not, as dynamic RoPE does.
_NEEDS_VALUES = "on meta tensors"
MAX_SHOWN = 200  # characters of a value or a reason


class _Skipped(nn.Module):
    """A decoder layer that does nothing."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the hidden states."""
        return hidden_states


class Trial:
    """One run of what a folder describes; every part is built when it is asked for."""

    def __init__(self, folder: Path, layout: LlavaLayout) -> None:
        self.folder = folder
        self.layout = layout

    @cached_property
    def config(self) -> Any:
        """The model's config."""
        data = read_json(self.folder / CONFIG_FILE)
        return model_classes(data)[0].from_dict(data)

    @cached_property
    def inputs(self) -> Any:
        """A question about an image, as the processor encodes it."""
        processor = build_processor(self.folder, self.config.model_type)
        side = self.layout.pixels
        image = Image.new("RGB", (side, side))
        sample = Sample("trial", (image,), (Turn(QUESTION, "It is red."),))
        encode(sample, processor, answer_tokens=8)
        text = chat_prompt(processor, sample, 0)
        special = adds_special(processor, text)
        return processor(text=text, images=[[image]], add_special_tokens=special, return_tensors="pt")

    @cached_property
    def model(self) -> Any:
        """The model, without memory for its weights."""
        with no_init_weights(), torch.device("meta"):
            return MODELS[type(self.config)]._from_config(self.config).eval()

    def run(self) -> None:
        """Run the vision tower on the image, and a layer of the decoder on as many tokens as the prompt has."""
        ids = self.inputs["input_ids"]
        length, positions = ids.shape[1], self.config.get_text_config().max_position_embeddings
        if length > positions:
            raise ValueError(
                f"a question about one image takes {length} tokens, but the model has {positions} positions"
            )
        sizes = {name: self.inputs[name] for name in GRID_INPUTS if name in self.inputs}
        pixels = self.inputs["pixel_values"].to("meta")
        images = self.model.model.get_image_features(pixel_values=pixels, **sizes, return_dict=True).pooler_output
        made, asked = sum(map(len, images)), int((ids == self.config.image_token_id).sum())
        if made != asked:
            raise ValueError(f"the vision tower makes {made} tokens of an image, the processor expects {asked}")
        decoder = self.model.model.language_model
        first, *others = decoder.layers  # they are alike
        decoder.layers = nn.ModuleList([first, *(_Skipped() for _ in others)])
        embeddings = self.model.get_input_embeddings()(ids.to("meta"))
        if self.model(inputs_embeds=embeddings, use_cache=True).logits.shape[1] != length:
            raise ValueError("the decoder does not return logits for every token")

    def generate(self) -> None:
        """Generate one token with logits that are all zero: what the generation config asks for is done."""

        def forward(input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
            last = torch.zeros(len(input_ids), 1, self.config.text_config.vocab_size)  # of long prompts all take GB
            return CausalLMOutputWithPast(logits=last)

        self.model.generation_config = config = self._generation_config()
        for key, (expected, fits) in SETTINGS.items():
            value = getattr(config, key, None)
            if value is not None and not fits(value):
                raise ValueError(f"expected {expected}")
        self.model.forward = forward
        text = {name: values for name, values in self.inputs.items() if name not in VISUAL}
        self.model.generate(**text, max_new_tokens=1, do_sample=False, num_beams=1)

    def _generation_config(self) -> GenerationConfig:
        """Return what transformers takes on loading."""
        if (self.folder / GENERATION_FILE).is_file():
            return GenerationConfig.from_pretrained(self.folder)
        return GenerationConfig.from_pretrained(self.folder, config_file_name=CONFIG_FILE, _from_model_config=True)


# What is done, one after another, and the files that decide whether it can be.
_STEPS: tuple[tuple[Callable[[Trial], object], tuple[str, ...]], ...] = (
    (lambda trial: trial.config, (CONFIG_FILE,)),
    (
        lambda trial: trial.inputs,
        (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, PROCESSOR_FILE, IMAGES_FILE, CONFIG_FILE),
    ),
    (lambda trial: trial.model, (CONFIG_FILE,)),
    (Trial.run, (CONFIG_FILE, PROCESSOR_FILE)),
    (Trial.generate, (GENERATION_FILE, TOKENIZER_CONFIG_FILE, CONFIG_FILE)),
)


def try_out(folder: Path, layout: LlavaLayout, source: Path) -> None:
    """Build and run what the small files of a converted folder describe.

    Args:
        folder: config.json, tokenizer and processor files, complete.
        layout: layout of the model.
        source: the folder that messages name.

    Raises:
        CheckpointError: if it cannot be built or run; names the file and, where it can be found, the key.
    """
    trial = Trial(folder, layout)
    with quietly(), torch.inference_mode():
        for step, files in _STEPS:
            try:
                with no_panic():
                    step(trial)
            except Exception as error:
                if step is Trial.run and _NEEDS_VALUES in str(error):
                    continue
                raise CheckpointError(_blame(error, step, files, trial, source)) from error


def _blame(
    error: Exception, step: Callable[[Trial], object], files: tuple[str, ...], trial: Trial, source: Path
) -> str:
    """Return the sentence that names the key without which a step succeeds, else the file."""
    reason = _shown(" ".join(str(error).split()) or type(error).__name__)
    remedy = "correct it, or take the file from the model that this one was made from"
    until = time.process_time() + SEARCH_S
    contents = {file: read_json_if_there(trial.folder / file) for file in files}
    candidates = [(file, key) for file, data in contents.items() for key in keys(data) if key[-1] not in NEVER_BLAMED]
    candidates.sort(key=_suspicion(error, contents))
    with TemporaryDirectory() as name:
        for path in trial.folder.iterdir():
            copy_file(path, Path(name, path.name))
        for file, key in candidates:
            if time.process_time() > until:
                break
            data, value = without(contents[file], key)
            write_json(Path(name, file), data)
            try:
                with no_panic():
                    step(Trial(Path(name), trial.layout))
            except Exception:  # noqa: BLE001 - this key is not to blame
                copy_file(trial.folder / file, Path(name, file))
            else:
                stated = _shown(repr(value))
                return f"{source / file} has the {'.'.join(key)} {stated}, which does not work ({reason}): {remedy}"
    return f"{source / files[0]} describes what cannot be run ({reason}): {remedy}"


def _suspicion(error: Exception, contents: Mapping[str, dict[str, Any]]) -> Callable[[tuple[str, Key]], Any]:
    """Return what keys are sorted by, the likeliest first.

    Those come first whose values are of another type than transformers' defaults, then those whose values the error
    repeats, then those that the traceback names, the last first.
    """
    said, reason = "".join(traceback.format_exception(error)), str(error)
    defaults = {GENERATION_FILE: GenerationConfig._get_default_generation_params()}
    with suppress(Exception):
        config = model_classes(contents[CONFIG_FILE])[0].from_dict({})
        defaults[CONFIG_FILE] = config.to_dict()

    def order(candidate: tuple[str, Key]) -> tuple[bool, bool, int]:
        file, key = candidate
        value, default = contents[file], defaults.get(file, {})
        for each in key:
            value = value[each]
            default = default.get(each) if isinstance(default, dict) else None
        is_odd = None not in (value, default) and type(value) is not type(default)
        return not is_odd, str(value) not in reason, -said.rfind(key[-1])

    return order


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} …"
