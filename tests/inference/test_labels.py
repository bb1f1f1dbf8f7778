"""Fine-tuning with the usual collators: routers take the routes that they take in `generate`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_cli.checkpoint.headers import read_json
from dpn_cli.conversion.convert import convert
from dpn_cli.errors import CheckpointError
from dpn_cli.exporting.export import export
from dpn_cli.inference.loading import load_model, load_processor
from dpn_cli.pyramid.config import PyramidConfig
from tests.conftest import tiny_tokenizer

QUESTIONS = ["what colour is the small circle ?", "how many ?", "describe this picture in one word"]
ANSWERS = ["red", "small blue square", "left"]


@pytest.fixture
def exported(make_converted: Callable[..., Path], tmp_path: Path) -> Path:
    export(make_converted(), tmp_path / "out")
    return tmp_path / "out"


def picture(seed: int) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8))


def messages(i: int, answered: bool, image: bool = True) -> list[dict[str, Any]]:
    content = [{"type": "image"}] * image + [{"type": "text", "text": QUESTIONS[i]}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[i]}]}
    return [{"role": "user", "content": content}, *[answer] * answered]


def encode(processor: Any, texts: list[str], images: list[Any], side: str = "left") -> Any:
    return processor(text=texts, images=images or None, return_tensors="pt", padding=True, padding_side=side)


def test_the_cue_of_the_chat_template_goes_into_the_config(exported: Path) -> None:
    tokenizer = tiny_tokenizer()
    cue = tuple(tokenizer.convert_tokens_to_ids(["ASSISTANT", ":"]))
    assert PyramidConfig.from_dict(read_json(exported / "config.json")["pyramid"]).answer_cue == cue


def test_an_older_conversion_gets_it_on_export(make_converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_converted()
    config = read_json(folder / "config.json")
    cue = config["pyramid"].pop("answer_cue")
    (folder / "config.json").write_text(json.dumps(config))
    export(folder, tmp_path / "out")
    assert cue and read_json(tmp_path / "out" / "config.json")["pyramid"]["answer_cue"] == cue


def test_a_tokenizer_that_cannot_read_its_own_template_is_refused(
    tiny_llava_factory: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_llava_factory(), tmp_path / "source")
    tokenizer = read_json(source / "tokenizer.json")
    tokenizer["model"]["unk_token"] = "<nothing>"
    tokenizer["model"]["vocab"].pop("ASSISTANT")
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has a model that fails with .*UNK"):
        convert(str(source), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shown", ["all", "all but images", "answers", "none"])
def test_routers_read_what_they_read_in_generate(exported: Path, side: str, shown: str) -> None:
    model, processor = load_model(exported), load_processor(exported)
    read: list[torch.Tensor] = []
    model.text_model.routers[0].register_forward_hook(lambda module, args, output: read.append(args[0]))
    pictures = [picture(i) for i in range(3)]
    for i in range(3):
        prompt = processor.apply_chat_template(messages(i, answered=False), add_generation_prompt=True)
        model.generate(**encode(processor, [prompt], [pictures[i]]), max_new_tokens=1)
    expected = torch.cat(read)

    texts = [processor.apply_chat_template(messages(i, answered=True)) for i in range(3)]
    texts.append(processor.apply_chat_template(messages(0, answered=True, image=False)))
    batch = encode(processor, texts, pictures, side)
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = -100
    if shown == "all but images":
        labels[batch["input_ids"] == processor.image_token_id] = -100
    if shown == "answers":
        for row, ids in enumerate(batch["input_ids"].tolist()):
            labels[row, : ids.index(processor.tokenizer.convert_tokens_to_ids("ASSISTANT")) + 2] = -100
    if shown != "none":  # label smoothing, and scores that candidates get by their logits, keep them from the model
        batch["labels"] = labels
    with torch.no_grad():
        model(**batch)
    assert torch.allclose(read[-1][:3], expected, atol=1e-4)
    assert model.last_routes[3] == model.pyramid.full_route
