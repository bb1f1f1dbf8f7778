"""Write a random LLaVA-1.5 in exactly the files of the hub: `llava-hf/llava-1.5-7b-hf`, or the 13B model.

Names, shapes, dtypes, shards, index, config, processor and tokenizer files are those of the hub (the tokenizer has as
many words as Llama's, but not its words); the weights are finite random fp16 numbers, so that the model runs and says
nothing. 14.1 GB take about a minute and 300 MB of memory:

    python benchmarks/random_checkpoint.py /tmp/llava-1.5-7b-hf
    python benchmarks/random_checkpoint.py /tmp/llava-1.5-13b-hf --layout llava-1.5-13b-hf --layers 4

The last line is a stand-in with the 13B model's shapes and fewer decoder layers, where the disk is short of 27 GB.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import numpy as np

from dpn_cli.checkpoint.headers import read_header
from dpn_cli.checkpoint.writer import write_index, write_json, write_shard
from dpn_cli.conversion.tokenizer import IMAGE_TOKEN, PAD_TOKEN, chat_template, write_processor
from dpn_cli.families.tensors import llava_tensors
from dpn_cli.families.text import TEXT_MODELS
from dpn_cli.pyramid.config import Shapes

# What the hub's text_config says; all else is left to the defaults of transformers' LlamaConfig.
LAYOUTS: dict[str, dict[str, Any]] = {
    "llava-1.5-7b-hf": {},
    "llava-1.5-13b-hf": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}  # fmt: skip
NUM_WORDS = 32000  # of Llama's vocabulary; `<image>` and `<pad>` follow, and rows up to a multiple of 64
SHARD_BYTES = 5_000_000_000
BLOCK_VALUES = 1 << 24  # random numbers that all tensors are cut from


def make(
    folder: Path,
    layout: str = "llava-1.5-7b-hf",
    text: Mapping[str, int] = MappingProxyType({}),
    vision: Mapping[str, int] = MappingProxyType({}),
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a random checkpoint; equal arguments give equal bytes.

    Args:
        folder: the folder to write, which must not exist.
        layout: one of `LAYOUTS`.
        text: changes of text_config, for a smaller model.
        vision: changes of vision_config.
        shard_bytes: the most bytes of tensors in a shard.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    config = hub_config(LAYOUTS[layout] | text, vision)
    sizes = TEXT_MODELS["llama"].completed(config["text_config"])
    shards = list(_shards(llava_tensors(config | {"text_config": sizes}), shard_bytes))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    block = np.random.default_rng(0).normal(0, 0.02, BLOCK_VALUES).astype(np.float16)
    for name, shapes in zip(names, shards, strict=True):
        content = (piece for tensor, shape in shapes.items() for piece in _values(tensor, shape, block))
        write_shard(folder / name, {n: ("F16", s) for n, s in shapes.items()}, content, {"format": "pt"})
    write_index(folder, [tensor for name in names for tensor in read_header(folder / name).values()])
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": NUM_WORDS + 1})
    write_processor(
        folder, tokenizer(), chat_template(), side=336, patch_size=14, normalisation={}, pad_to_square=False
    )
    return folder


def hub_config(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json as it is on the hub, with these changes of text_config and vision_config."""
    return {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": NUM_WORDS,
        "model_type": "llava", "pad_token_id": NUM_WORDS + 1, "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
        } | dict(text),
        "tie_word_embeddings": False, "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            "vocab_size": 32000,
        } | dict(vision),
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
    }  # fmt: skip


def tokenizer() -> Any:
    """Return a tokenizer with the ids of LLaVA-1.5's special tokens, and bytes and made-up words for the others."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"▁word{i}" for i in range(len(words), NUM_WORDS)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (IMAGE_TOKEN, PAD_TOKEN)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=PAD_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN}, padding_side="left",
    )  # fmt: skip


def _shards(shapes: Shapes, limit: int) -> Iterator[Shapes]:
    """Fill shards in the order of the model: tower, projector, language model."""
    order = ("vision_tower.", "multi_modal_projector.", "language_model.")
    shard: Shapes = {}
    for name in sorted(shapes, key=lambda name: next(i for i, part in enumerate(order) if name.startswith(part))):
        if shard and 2 * sum(map(np.prod, (*shard.values(), shapes[name]))) > limit:
            yield shard
            shard = {}
        shard[name] = shapes[name]
    yield shard


def _values(name: str, shape: tuple[int, ...], block: np.ndarray) -> Iterator[memoryview]:
    """Yield a tensor's bytes: pieces of `block`, from a place that the name decides; scales of norms are ones."""
    left = int(np.prod(shape))
    if "norm" in name and name.endswith("weight"):
        yield np.ones(left, np.float16).view(np.uint8).data
        return
    start = sum(name.encode()) * 4099 % len(block)
    while left:
        piece = block[start : start + left]
        yield piece.view(np.uint8).data
        start, left = 0, left - len(piece)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layout", type=click.Choice(list(LAYOUTS)), default="llava-1.5-7b-hf", show_default=True)
@click.option("--layers", type=int, help="Decoder layers, for a smaller stand-in; default: the model's.")
def main(folder: Path, layout: str, layers: int | None) -> None:
    """Write a random checkpoint into FOLDER."""
    make(folder, layout, {"num_hidden_layers": layers} if layers else {})
    size = sum(path.stat().st_size for path in folder.iterdir())
    click.echo(f"{folder}: {size / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} shards", err=True)


if __name__ == "__main__":
    main()
