"""Tokens and pixels of a converted original are those of the original code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sentencepiece import SentencePieceProcessor
from transformers import AutoProcessor

from dpn_cli.conversion.convert import convert
from dpn_cli.conversion.tokenizer import SYSTEM_PROMPT, Words, chat_template
from dpn_cli.errors import MissingExtraError
from tests.originals import Original

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE = 340


@pytest.fixture
def make_processor(make_original: Callable[..., Original], tmp_path: Path) -> Callable[..., Any]:
    """Return `make(**changes of config.json)`: the processor of a converted original."""

    def make(**changes: Any) -> Any:
        original = make_original()
        original.edit(**changes)
        output = convert(str(original.folder), output=tmp_path / "out", vision_tower=str(original.clip)).output
        return AutoProcessor.from_pretrained(output)

    return make


def question(text: str, images: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def original_ids(words: SentencePieceProcessor, prompt: str) -> list[int]:
    """Return the ids as LLaVA's `tokenizer_image_token` makes them: what stands between images, piece by piece."""
    ids = [words.bos_id()]
    for i, piece in enumerate(prompt.split("<image>")):
        ids += [IMAGE] * (144 if i else 0) + words.encode(piece)
    return ids


def reference_pixels(image: Image.Image, side: int) -> np.ndarray:
    """Return LLaVA-1.5's pixels: padded to a square with the mean colour, resized, normalised."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (122, 116, 104))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    return ((pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(90, 40), (31, 77), (48, 48), (7, 300)])
def test_pixels_are_those_of_a_padded_square(make_processor: Callable[..., Any], size: tuple[int, int]) -> None:
    processor = make_processor()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = processor(text="<image>", images=image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(found, reference_pixels(image, 48))


def test_without_padding_the_middle_is_cut_out(make_processor: Callable[..., Any]) -> None:
    from transformers import CLIPImageProcessorPil

    processor = make_processor(image_aspect_ratio=None)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 99, 3), dtype=np.uint8))
    clip = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    found = processor(text="<image>", images=image, return_tensors="np")["pixel_values"]
    assert np.array_equal(found, clip(image, return_tensors="np")["pixel_values"])


def test_a_prompt_has_the_original_ids(make_processor: Callable[..., Any], tokenizer_model: Path) -> None:
    processor = make_processor()
    words = SentencePieceProcessor(model_file=str(tokenizer_model))
    text = processor.apply_chat_template([question("What is in this picture?")], add_generation_prompt=True)
    picture = Image.new("RGB", (48, 48))
    ids = processor(text=text, images=picture)["input_ids"][0]
    prompt = f"{SYSTEM_PROMPT} USER: <image>\nWhat is in this picture? ASSISTANT:"
    assert ids == original_ids(words, prompt)
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).replace(" \n", "\n") == prompt.replace(
        "<image>", ""
    )
    assert (processor.tokenizer.pad_token, processor.tokenizer.pad_token_id) == ("<pad>", 341)
    assert (processor.tokenizer.padding_side, processor.tokenizer.model_max_length) == ("left", 2048)


def test_turns_follow_the_format_v1(make_processor: Callable[..., Any]) -> None:
    template = make_processor().apply_chat_template
    turns = [question("a picture?"), answer("A circle."), question("is it red?", images=0)]
    assert template(turns, add_generation_prompt=True) == (
        f"{SYSTEM_PROMPT} USER: <image> \na picture? ASSISTANT: A circle.</s>USER: is it red? ASSISTANT:"
    )
    system = {"role": "system", "content": "Be polite."}
    assert template([system, question("what?")]) == "Be polite. USER: <image> \nwhat? "


def test_every_answer_ends_once_in_calibration(make_processor: Callable[..., Any]) -> None:
    from dpn_cli.data.encoding import encode
    from dpn_cli.data.samples import Sample, Turn

    turns = (Turn("a picture?", "A circle.", images=1), Turn("red?", "A red circle."))
    example = encode(Sample("1", (Image.new("RGB", (48, 48)),), turns), make_processor(), answer_tokens=64)
    assert (example.input_ids == 2).sum() == 2 == (example.labels == 2).sum()


def test_the_router_token_ends_every_question_about_an_image() -> None:
    from jinja2 import Environment

    template = Environment().from_string(chat_template("<ROUTER>"))
    turns = [question("a?"), answer("b"), question("c?", images=0)]
    assert template.render(messages=turns, add_generation_prompt=True) == (
        f"{SYSTEM_PROMPT} USER: <image> \na?<ROUTER> ASSISTANT: b</s>USER: c?<ROUTER> ASSISTANT:"
    )
    assert "<ROUTER>" not in template.render(messages=[question("a?", images=0)])


def test_added_tokens_take_the_blanks_around_them(tmp_path: Path, tokenizer_model: Path) -> None:
    """What follows starts a word with legacy tokenizers alone: the ids of transformers 4.31, which the authors pin."""
    words = SentencePieceProcessor(model_file=str(tokenizer_model))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    start = words.encode("picture?")
    for legacy in (None, True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        tokenizer = Words.of(tmp_path).tokenizer(["<image>", "<pad>", "<ROUTER>"])
        end = words.encode("xASSISTANT:")[len(words.encode("x")) :] if legacy is False else words.encode("ASSISTANT:")
        for before, after in (("", " "), (" ", " "), ("", ""), (" \n", "\n"), ("\t  ", "  ")):
            text = f"picture?{before}<ROUTER>{after}ASSISTANT:"
            assert tokenizer.encode(text, add_special_tokens=False) == [*start, 342, *end], repr(text)


def test_a_tokenizer_json_needs_no_sentencepiece(
    tmp_path: Path, tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    first = Words.of(tmp_path / "model").tokenizer(["<old>", "<image>", "<pad>"])
    first.save_pretrained(tmp_path / "json")
    settings = json.loads((tmp_path / "json" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizer"
    (tmp_path / "json" / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    words = Words.of(tmp_path / "json")
    assert words.added == {340: "<old>", 341: "<image>", 342: "<pad>"}
    again = words.tokenizer(["<image>", "<pad>"])
    prompt = "USER: What is in this picture? ASSISTANT: A red circle.é"
    assert again.encode(prompt) == first.encode(prompt)
    assert (len(again), again.convert_tokens_to_ids("<image>")) == (342, 340)


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_without_sentencepiece_the_extra_is_named(
    make_original: Callable[..., Original], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    original = make_original()
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(MissingExtraError, match=r"dpn-cli\[original\]"):
        convert(str(original.folder), output=tmp_path / "out", vision_tower=str(original.clip))
    assert not (tmp_path / "out").exists()
