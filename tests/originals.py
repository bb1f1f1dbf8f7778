"""One small random LLaVA in every layout: the original one with its CLIP model, and two of Hugging Face's."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from dpn_cli.conversion.tokenizer import IMAGE_TOKEN, PAD_TOKEN, Words, chat_template, write_processor
from tests.faults.damage import GONE, put

TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What is in this picture? ASSISTANT: A red circle."
)
SIDE, PATCH = 48, 4
CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH, "projection_dim": 32,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
    "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip


@dataclass(frozen=True)
class Original:
    """A checkpoint in the original layout.

    Attributes:
        folder: with .bin shards, or safetensors.
        clip: the folder of its vision tower.
        rows: of the embedding.
        tensors: of the same model as transformers 5 has it in memory, with rows of zeros for `<image>` and `<pad>`.
        config: of the same model in Hugging Face's layout.
    """

    folder: Path
    clip: Path
    rows: int
    tensors: dict[str, torch.Tensor]
    config: LlavaConfig

    def reference(self) -> LlavaForConditionalGeneration:
        """Return the same model as transformers has it."""
        model = LlavaForConditionalGeneration(self.config).eval()
        for parameter in model.parameters():  # not buffers: rotary frequencies are float32
            parameter.data = parameter.data.to(self.config.dtype)
        model.load_state_dict(self.tensors)
        return model

    def edit(self, **changes: Any) -> None:
        """Change config.json; None removes a key."""
        for key, value in changes.items():
            put(self.folder / "config.json", key, value=GONE if value is None else value)

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put tensors beside those of the folder, or in the place of them."""
        whole = self.folder / "model.safetensors"
        if whole.exists():
            save_file(load_file(whole) | tensors, whole, metadata={"format": "pt"})
            return
        shard, path = (self.folder / f"pytorch_model{end}" for end in ("-00002-of-00002.bin", ".bin.index.json"))
        torch.save(torch.load(shard) | tensors, shard)
        index = json.loads(path.read_text())
        index["weight_map"] |= dict.fromkeys(tensors, shard.name)
        path.write_text(json.dumps(index))


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of Llama's kind, with few words."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    words = TEXT.split()
    (folder / "text").write_text("\n".join(" ".join(words[i:] + words[:i]) for i in range(len(words))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def originals(tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Original]:
    """Return `make(...) -> Original`; equal arguments give the same folders, which nobody may change."""
    made: dict[str, Original] = {}

    def make(**options: Any) -> Original:
        key = str(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("original")
            made[key] = write_original(folder / "llava", folder / "clip", tokenizer_model, **options)
        return made[key]

    return make


@pytest.fixture
def make_original(originals: Callable[..., Original], tmp_path: Path) -> Callable[..., Original]:
    """Return `make(...) -> Original`, with folders of its own; for the options see `write_original`."""

    def make(**options: Any) -> Original:
        made = originals(**options)
        return replace(
            made,
            folder=Path(shutil.copytree(made.folder, tmp_path / "llava-v1.5-tiny")),
            clip=Path(shutil.copytree(made.clip, tmp_path / "clip")),
            tensors=dict(made.tensors),
        )

    return make


def write_original(
    folder: Path,
    clip: Path,
    tokenizer_model: Path,
    text: str = "llama",
    files: str = "bin",
    tower_inside: bool = False,
    projector: str = "mlp2x_gelu",
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    added: tuple[str, ...] = (),
) -> Original:
    """Write a random LLaVA as its authors' code does.

    Args:
        folder: of the checkpoint.
        clip: folder of the vision tower.
        tokenizer_model: from the fixture of this name.
        text: `llama` or `mistral`.
        files: `bin` (two shards and an index), `old bin` (no zip archive), or `safetensors` (one file).
        tower_inside: with the vision tower, as DeepSpeed saves a fine-tune.
        projector: `mlp2x_gelu` or `linear`.
        dtype: of the language model.
        tied: whether lm_head is the embedding.
        added: tokens after the vocabulary.
    """
    import sentencepiece

    for each in (folder, clip):
        each.mkdir(parents=True)
    words = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model)).get_piece_size()
    rows = words + len(added)
    window = {"sliding_window": None} if text == "mistral" else {}
    config = LlavaConfig(
        text_config=AutoConfig.for_model(
            text, **LLAMA, **window, vocab_size=rows, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied
        ),
        vision_config=CLIPVisionConfig(**CLIP, initializer_factor=4.0),
        image_token_index=rows, projector_hidden_act="linear" if projector == "linear" else "gelu",
        tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    if projector == "linear":
        torch.nn.init.eye_(model.model.multi_modal_projector.linear_2.weight)
        torch.nn.init.zeros_(model.model.multi_modal_projector.linear_2.bias)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors = {name: t if "vision_tower" in name else t.to(dtype) for name, t in tensors.items()}
    _write_clip(clip, tensors)
    stored = {}
    for name, tensor in tensors.items():
        if new := _original_name(name, projector, tower_inside, tied):
            stored[new] = tensor
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    _write_weights(folder, stored, files)
    (folder / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "model_max_length": 2048, "padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))
    if added:
        (folder / "added_tokens.json").write_text(json.dumps({token: words + i for i, token in enumerate(added)}))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}')
    (folder / "LICENSE.txt").write_text("licence")
    (folder / "config.json").write_text(
        json.dumps(
            LLAMA
            | window
            | {
                "architectures": ["LlavaMistralForCausalLM" if text == "mistral" else "LlavaLlamaForCausalLM"],
                "model_type": "llava_mistral" if text == "mistral" else "llava",
                "vocab_size": rows, "torch_dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": tied,
                "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "mm_hidden_size": 32,
                "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": projector,
                "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad",
                "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
            }
        )
    )  # fmt: skip
    config.dtype, config.text_config.vocab_size = dtype, -(-(rows + 2) // 64) * 64
    missing = config.text_config.vocab_size - rows
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name].new_zeros(missing, 64)])
    return Original(folder, clip, rows, tensors, config)


def write_hugging_face(original: Original, folder: Path, layout: str, files: str = "safetensors") -> Path:
    """Write the same model in Hugging Face's layout.

    Args:
        original: the model.
        folder: to write.
        layout: `hub`, or `new` for names as transformers 5 has them in memory.
        files: see `write_original`.
    """
    from tests.conftest import hub_name

    folder.mkdir()
    original.config.architectures = ["LlavaForConditionalGeneration"]
    original.config.save_pretrained(folder)
    renamed = {hub_name(name) if layout == "hub" else name: tensor for name, tensor in original.tensors.items()}
    if original.config.tie_word_embeddings:
        renamed.pop("language_model.lm_head.weight" if layout == "hub" else "lm_head.weight")
    _write_weights(folder, renamed, files)
    tokenizer = Words.of(original.folder).tokenizer([IMAGE_TOKEN, PAD_TOKEN])
    write_processor(folder, tokenizer, chat_template(), SIDE, PATCH, normalisation={}, pad_to_square=True)
    return folder


def _write_clip(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tower as the whole CLIP model that it is a part of: one .bin file, as OpenAI's on the hub."""
    inside = "model.vision_tower."
    stored = {f"vision_model.{name.removeprefix(inside)}": t for name, t in tensors.items() if name.startswith(inside)}
    stored |= {"vision_model.embeddings.position_ids": torch.arange(145)[None], "logit_scale": torch.ones(())}
    stored |= {"text_model.final_layer_norm.weight": torch.ones(8), "visual_projection.weight": torch.ones(8, 8)}
    torch.save(stored, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": CLIP, "text_config": {}}))
    mean = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(mean))


def _original_name(name: str, projector: str, tower_inside: bool, tied: bool) -> str | None:
    if name == "lm_head.weight":
        return None if tied else name
    table = {
        "model.language_model.": "model.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model." if tower_inside else None,
        "model.multi_modal_projector.linear_1.": "model.mm_projector." + ("" if projector == "linear" else "0."),
        "model.multi_modal_projector.linear_2.": None if projector == "linear" else "model.mm_projector.2.",
    }
    start = next(start for start in table if name.startswith(start))
    return None if table[start] is None else f"{table[start]}{name.removeprefix(start)}"


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], files: str) -> None:
    if files == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in (0, 1):
        name = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        part = {key: tensors[key] for key in sorted(tensors)[i::2]}
        torch.save(part, folder / name, _use_new_zipfile_serialization=files != "old bin")
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
