"""Shared fixtures: a tiny random LLaVA checkpoint, in the layouts that users bring."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.trials import remember_trials

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: on a busy machine more threads only wait

pytest_plugins = ["tests.converted", "tests.originals", "tests.hr", "tests.pyramids", "tests.teachers", "tests.tiled"]


def pytest_collection_finish() -> None:
    """Let the garbage collector look less often, and not at what modules hold: it took a sixth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_configure() -> None:
    """Let configs be short in messages: transformers writes each out several times for what it never says."""
    from transformers import PreTrainedConfig

    PreTrainedConfig.__repr__ = object.__repr__
    remember_trials()


TextType = Literal["llama", "mistral", "qwen2", "qwen3"]
Layout = Literal["hub", "new"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
WORDS = (
    "USER ASSISTANT : ? . , what which where is are the a of in this picture image colour shape how many "
    "describe say one word red green blue yellow circle square small large left right top bottom"
)
VOCAB_SIZE = 304


@pytest.fixture(scope="session")
def tiny_llava(tiny_llava_factory: Callable[..., Path]) -> Path:
    """A tiny Llama-type LLaVA as a hub checkpoint: one model.safetensors."""
    return tiny_llava_factory()


@pytest.fixture
def source(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a good checkpoint in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_llava, "source"))


@pytest.fixture(scope="session")
def tiny_llava_factory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `make(text="llama", layout="hub", shards=1) -> Path`; equal arguments give the same folder.

    The model: 48×48 px in patches of 4 (12×12 = 144 visual tokens), 8 decoder layers of width 64, fp32.
    The folders are shared by the session: copy one before you change it.
    """
    made: dict[tuple[str, str, int], Path] = {}

    def make(text: TextType = "llama", layout: Layout = "hub", shards: int = 1) -> Path:
        key = (text, layout, shards)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{text}-{layout}-{shards}")
            _save_processor(folder)
            _save_model(folder, text, layout, shards)
            made[key] = folder
        return made[key]

    return make


def tiny_tokenizer(**special: str) -> Any:
    """Return a tokenizer that knows few words, some of them special under these names."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *WORDS.split()]
    words += [f"word{i}" for i in range(VOCAB_SIZE - len(words))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", **special}, padding_side="left",
    )  # fmt: skip


def _save_processor(folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    size = {"height": 48, "width": 48}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=size),
        tiny_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def _save_model(folder: Path, text: TextType, layout: Layout, shards: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision_config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=48,
        patch_size=4, projection_dim=32, initializer_factor=4.0,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=tiny_text_config(text), vision_config=vision_config, image_token_index=4,
        image_seq_length=144, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "float32"
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)

    rename = {"hub": hub_name, "new": str}[layout]
    tensors = {rename(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tiny_text_config(text: TextType) -> Any:
    """Return the config of a decoder of 8 layers of width 64."""
    from transformers import AutoConfig

    extra: dict[str, Any] = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 32}}.get(text, {})
    return AutoConfig.for_model(
        text, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB_SIZE, max_position_embeddings=2048, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=3, tie_word_embeddings=False, **extra,
    )  # fmt: skip


def hub_name(name: str) -> str:
    """Return the name that llava-hf checkpoints on the hub give to a tensor of transformers 5."""
    for new, hub in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.image_newline", "image_newline"),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(new):
            return hub + name.removeprefix(new)
    raise ValueError(f"no hub name for {name}")
