"""A folder's processor is held against its model: completed, or refused with the file and the key."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from dpn_cli.checkpoint.inspection import inspect_checkpoint
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import CheckpointError, UsageError
from dpn_cli.exporting.export import export
from dpn_cli.exporting.options import ExportOptions
from dpn_cli.families.family import FAMILIES
from dpn_cli.inference.loading import load_processor
from tests.conftest import CHAT_TEMPLATE
from tests.faults.damage import Harm, both, edit

PROCESSOR, IMAGES, TOKENIZER = "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"
NULLS = ("image_mean", "image_std", "rescale_factor", "resample", "do_resize", "do_rescale", "do_center_crop")
TEXT_ONLY = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] | string }}{% endfor %}"


@pytest.fixture
def make_source(tiny_llava: Path, tiny_tiled: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return `make(family) -> Path`: a checkpoint of its own."""

    def make(family: str) -> Path:
        made = tiny_llava if family == "llava" else tiny_tiled(family)
        return Path(shutil.copytree(made, tmp_path / "source"))

    return make


def images(key: str, value: Any) -> Harm:
    """Return what sets a value of the image processor."""
    return edit(PROCESSOR, "image_processor", key, value=value)


def old_layout(folder: Path) -> None:
    """Store the image processor as before there was a processor_config.json."""
    images = json.loads((folder / PROCESSOR).read_text())["image_processor"]
    (folder / PROCESSOR).unlink()
    (folder / IMAGES).write_text(json.dumps(images))
    edit(TOKENIZER, "processor_class")(folder)


def template_in_tokenizer(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    edit(TOKENIZER, "chat_template", value=[{"name": "default", "template": template.read_text()}])(folder)
    template.unlink()


def weights_alone(folder: Path) -> None:
    """Leave what `model.save_pretrained` writes."""
    for path in folder.iterdir():
        if "safetensors" not in path.name and path.name not in ("config.json", "generation_config.json"):
            path.unlink()


def template_nowhere(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def other_image_token(folder: Path) -> None:
    """Name the image's token otherwise, and nowhere but in the vocabulary."""
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<image>"', '"<|image|>"'))
    edit(TOKENIZER, "image_token")(folder)
    edit(PROCESSOR, "image_token")(folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<image>", "<|image|>"))


def encoded(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Return a prompt, and what a processor makes of it and of one that is longer."""
    processor = load_processor(folder)
    content = [{"type": "image"}, {"type": "text", "text": "what colour ?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [[Image.new("RGB", (30, 70), "red")], [Image.new("RGB", (50, 20), "blue")]]
    inputs = processor(
        text=[prompt, f"{prompt} red"], images=images, padding=True, padding_side="left", return_tensors="pt"
    )
    inputs["input_ids"][inputs["attention_mask"] == 0] = 0  # what pads is masked
    return prompt.replace("<|image|>", "<image>"), dict(inputs)


def assert_same(found: tuple[str, dict[str, torch.Tensor]], expected: tuple[str, dict[str, torch.Tensor]]) -> None:
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


COMPLETED: list[tuple[str, Harm, tuple[str, ...]]] = [
    (
        "llava",
        both(
            edit(PROCESSOR, "patch_size", value=None),
            edit(PROCESSOR, "num_additional_image_tokens"),
            edit(PROCESSOR, "vision_feature_select_strategy", value=None),
            edit(PROCESSOR, "image_processor", "crop_size"),
            edit(PROCESSOR, "image_processor", "size", value=None),
            edit(PROCESSOR, "image_processor", "image_processor_type"),
        ),
        ("patch_size 4", "num_additional_image_tokens 1", "strategy 'default'", "crop_size", ".size", "_type"),
    ),
    (
        "llava",
        both(*(images(key, value=None) for key in NULLS)),
        ("image_mean [0.48145466", "image_std [0.26862954", "rescale_factor 0.0039", "resample 3", "do_resize True"),
    ),
    ("llava", old_layout, ("processor_class 'LlavaProcessor'", "patch_size 4", "num_additional_image_tokens 1")),
    ("llava", both(template_in_tokenizer, edit(TOKENIZER, "pad_token")), ("chat template of", "pad_token '<pad>'")),
    ("llava", edit(TOKENIZER, "pad_token", value="<image>"), ("pad_token '<pad>'",)),
    (
        "llava",
        both(
            edit(TOKENIZER, "pad_token", value="[PAD]"),
            edit("config.json", "text_config", "pad_token_id"),
            edit("generation_config.json", "pad_token_id"),
        ),
        ("pad_token '</s>'",),
    ),
    ("llava", both(other_image_token, edit(TOKENIZER, "eos_token")), ("eos_token '</s>'", "image_token '<|image|>'")),
    (
        "llava_next",
        both(
            edit(PROCESSOR, "patch_size"),
            edit(PROCESSOR, "image_processor", "image_grid_pinpoints"),
            edit(PROCESSOR, "image_processor", "crop_size"),
        ),
        ("patch_size 4", "image_grid_pinpoints", "crop_size"),
    ),
    ("llava_next", old_layout, ("num_additional_image_tokens 1", "processor_class 'LlavaNextProcessor'")),
    (
        "llava_onevision",
        both(
            edit(PROCESSOR, "num_image_tokens"),
            edit(PROCESSOR, "vision_aspect_ratio"),
            edit(PROCESSOR, "image_processor", "size"),
            edit(PROCESSOR, "video_processor"),
        ),
        ("num_image_tokens 25", "vision_aspect_ratio 'anyres_max_4'", "size", "LlavaOnevisionVideoProcessor"),
    ),
    ("llava_onevision", old_layout, ("num_image_tokens 25", "vision_aspect_ratio")),
]  # fmt: skip


@pytest.mark.parametrize("family", sorted({family for family, _, _ in COMPLETED}))
def test_where_nothing_is_missing_nothing_is_completed(
    make_source: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    assert not convert(str(make_source(family)), output=tmp_path / "out").notes


@pytest.mark.parametrize(("family", "harm", "keys"), COMPLETED)
def test_what_the_config_implies_is_completed(
    make_source: Callable[[str], Path],
    make_converted: Callable[..., Path],
    tmp_path: Path,
    family: str,
    harm: Harm,
    keys: tuple[str, ...],
) -> None:
    source, earlier = make_source(family), make_converted(calibrated=False, family=family)
    expected = encoded(earlier)
    harm(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    done = convert(str(source), output=tmp_path / "out")
    assert all(key in done.notes[-1] for key in keys)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert_same(encoded(done.output), expected)

    harm(earlier)  # what dpn has written before it looked at the processor
    assert_same(encoded(earlier), expected)
    exported = export(earlier, tmp_path / "exported", ExportOptions(uncalibrated=True))
    for notes in (inspect_checkpoint(earlier).notes, exported.notes):
        assert all(key in notes[-1] for key in keys)
    for complete in (done.output, exported.output):
        assert not inspect_checkpoint(complete).notes, "nothing is left to complete"


REFUSED: list[tuple[str, Harm, str]] = [
    ("llava", edit(PROCESSOR, "patch_size", value=8), f"{PROCESSOR} has the patch_size 8"),
    ("llava", edit(PROCESSOR, "num_additional_image_tokens", value=0), "num_additional_image_tokens 0"),
    ("llava", edit(PROCESSOR, "vision_feature_select_strategy", value="full"), "select_strategy 'full'"),
    ("llava", edit(PROCESSOR, "vision_feature_select_strategy", value={}), "select_strategy {}"),
    ("llava", edit(PROCESSOR, "processor_class", value="LlavaNextProcessor"), "processor_class"),
    ("llava", edit(PROCESSOR, "image_processor", "crop_size", value={"height": 24, "width": 24}), "crop_size"),
    ("llava", edit(PROCESSOR, "image_processor", "size", value={"shortest_edge": 24}), "image_processor.size"),
    ("llava", edit(PROCESSOR, "image_processor", "do_center_crop", value=False), "image_processor.size"),
    ("llava", edit(PROCESSOR, "image_processor", "image_processor_type", value="LlavaNextImageProcessorFast"), "type"),
    ("llava", edit(PROCESSOR, "image_processor"), f"neither {IMAGES}"),
    ("llava", edit("config.json", "image_token_index", value=7), "config.json has the image_token_index 7"),
    ("llava", edit(TOKENIZER, "image_token", value="<img>"), "has no token '<img>'"),
    ("llava", edit(TOKENIZER, "eos_token", value="<end>"), f"{TOKENIZER} has the eos_token '<end>'"),
    ("llava", edit("generation_config.json", "eos_token_id", value=[2, 304]), "eos_token_id 304"),
    ("llava", edit("config.json", "text_config", "pad_token_id", value=304), "text_config.pad_token_id 304"),
    ("llava", template_nowhere, "no chat template"),
    ("llava", weights_alone, "a model without its tokenizer and image processor: save them there, too"),
    ("llava", lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    ("llava", images("image_mean", value=[0.5]), "image_processor.image_mean [0.5], expected one number or three"),
    ("llava", images("image_mean", value="x"), "image_mean 'x'"),
    ("llava", images("image_mean", value=["a", "b", "c"]), "image_mean ['a', 'b', 'c']"),
    ("llava_next", images("image_std", value=[0.5, 0, 0.5]), "image_std [0.5, 0, 0.5], expected one positive"),
    ("llava_onevision", images("image_std", value=0), "image_std 0"),
    ("llava_onevision", images("rescale_factor", value=0), "rescale_factor 0, expected a positive number"),
    ("llava", images("rescale_factor", value="1/255"), "rescale_factor '1/255'"),
    ("llava", images("rescale_factor", value=True), "rescale_factor True"),
    ("llava_next", images("resample", value="bicubic"), "resample 'bicubic', expected a filter"),
    ("llava", images("resample", value=9), "resample 9"),
    ("llava", images("do_normalize", value="no"), "do_normalize 'no', expected true or false"),
    ("llava", both(images("do_resize", value=False), images("do_center_crop", value=False)), "do_resize False"),
    ("llava_onevision", images("do_resize", value=False), "do_resize False"),
    ("llava", images("image_processor_type", value="FooImageProcessor"), "image_processor_type 'FooImageProcessor'"),
    ("llava", images("image_processor_type", value=3), "image_processor_type 3"),
    ("llava", edit("config.json", "image_token_id", value=5), "image_token_index 4 and the image_token_id 5"),
    ("llava_next", edit(PROCESSOR, "image_processor", "image_grid_pinpoints", value=[[24, 48]]), "grid_pinpoints"),
    ("llava_next", edit(PROCESSOR, "image_processor", "size", value={"shortest_edge": 48}), "image_processor.size"),
    ("llava_next", edit(PROCESSOR, "image_processor", "image_processor_type", value="CLIPImageProcessor"), "type"),
    ("llava_onevision", edit(PROCESSOR, "num_image_tokens", value=729), "num_image_tokens 729"),
    ("llava_onevision", edit(PROCESSOR, "vision_aspect_ratio", value="anyres_max_9"), "vision_aspect_ratio"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "harm", "complaint"), REFUSED)
def test_what_contradicts_the_config_is_named_before_the_work(
    make_source: Callable[[str], Path],
    make_converted: Callable[..., Path],
    tmp_path: Path,
    family: str,
    harm: Harm,
    complaint: str,
) -> None:
    source, earlier = make_source(family), make_converted(calibrated=False, family=family)
    harm(source)
    harm(earlier)
    for act in (
        lambda: convert(str(source), output=tmp_path / "again"),
        lambda: inspect_checkpoint(source),
        lambda: load_processor(earlier),
        lambda: export(earlier, tmp_path / "exported", ExportOptions(uncalibrated=True)),
    ):
        with pytest.raises(CheckpointError) as error:
            act()
        assert complaint in str(error.value)
    assert not (tmp_path / "again").exists() and not (tmp_path / "exported").exists()


def test_a_token_beyond_the_embedding_is_named(make_source: Callable[[str], Path], tmp_path: Path) -> None:
    source = make_source("llava")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(source)
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json gives '\[PAD\]' the id 304, but the embedding ends at 303"
    ):
        convert(str(source), output=tmp_path / "out")


def test_a_strategy_that_leaves_the_same_tokens_will_do(make_source: Callable[[str], Path], tmp_path: Path) -> None:
    source = make_source("llava")
    expected = encoded(convert(str(source), output=tmp_path / "whole").output)
    edit(PROCESSOR, "vision_feature_select_strategy", value="full")(source)
    edit(PROCESSOR, "num_additional_image_tokens", value=0)(source)
    edit(PROCESSOR, "image_processor", "size", value=48)(source)
    done = convert(str(source), output=tmp_path / "out")
    assert not done.notes
    assert_same(encoded(done.output), expected)


def test_what_is_switched_off_need_not_make_sense(make_source: Callable[[str], Path], tmp_path: Path) -> None:
    source = make_source("llava")
    for harm in (images("do_normalize", value=False), images("image_std", value=0), images("image_mean", value=None)):
        harm(source)
    images("image_processor_type", value="SiglipImageProcessorFast")(source)
    assert not convert(str(source), output=tmp_path / "out").notes


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        *((each, "show images") for each in (TEXT_ONLY, "{{ raise_exception('no') }}", "{% if %}")),
        ("USER: <image>", "write questions as they are"),
        (CHAT_TEMPLATE.replace("part['text']", "part['text'] | upper"), "write questions as they are"),
    ],
)
def test_a_template_that_does_not_show_what_is_asked_is_refused_and_can_be_given(
    make_source: Callable[[str], Path], tmp_path: Path, template: str, fault: str
) -> None:
    source, file = make_source("llava"), tmp_path / "file.jinja"
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=rf"chat_template\.json does not {fault}.*--chat-template FILE"):
        convert(str(source), output=tmp_path / "out")
    file.write_text(CHAT_TEMPLATE.replace("USER", "HUMAN"))
    output = convert(str(source), output=tmp_path / "out", chat_template=file).output
    assert transformers.AutoProcessor.from_pretrained(output).chat_template == file.read_text()
    file.write_text(template)
    with pytest.raises(UsageError, match=rf"file\.jinja does not {fault}"):
        convert(str(source), output=tmp_path / "again", chat_template=file)


@pytest.mark.parametrize(
    ("family", "named"),
    [
        *product(("llava", "llava_next"), ("LlamaTokenizer", "BertTokenizer", "PreTrainedTokenizerFast", None)),
        *(pytest.param("llava_onevision", named, marks=pytest.mark.slow) for named in ("LlamaTokenizer", None)),
    ],
)
def test_words_become_the_tokens_of_the_original_whatever_class_its_tokenizer_has(
    make_source: Callable[[str], Path], tmp_path: Path, family: str, named: str | None
) -> None:
    """For some types of models transformers takes another class than the one that is named."""
    taken = TOKENIZER_MAPPING_NAMES.get(family)
    assert FAMILIES[family].plain_tokenizer == (taken == "TokenizersBackend")
    source = make_source(family)
    edit(TOKENIZER, "tokenizer_class", value=named)(source)
    text = "USER: what  colour ?\nASSISTANT:"
    expected = transformers.AutoTokenizer.from_pretrained(source)(text)["input_ids"]
    converted = convert(str(source), output=tmp_path / "dpn").output
    exported = export(converted, tmp_path / "exported", ExportOptions(uncalibrated=True)).output
    earlier = Path(shutil.copytree(converted, tmp_path / "earlier"))  # a version before this one left the name
    edit(TOKENIZER, "tokenizer_class", value=named)(earlier)
    if family != "llava_onevision":  # whose processor needs torchvision
        for folder in (source, converted, exported):
            assert transformers.AutoProcessor.from_pretrained(folder).tokenizer(text)["input_ids"] == expected
    for tokenizer in (
        load_processor(converted).tokenizer, load_processor(earlier).tokenizer, load_processor(exported).tokenizer,
        *(transformers.AutoTokenizer.from_pretrained(folder) for folder in (converted, exported)),
    ):  # fmt: skip
        assert tokenizer(text)["input_ids"] == expected
