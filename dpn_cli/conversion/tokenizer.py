"""Tokenizer, image processor and chat template for a model that comes in the original LLaVA layout."""

import importlib.util
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_cli.checkpoint.headers import read_json, read_json_if_there
from dpn_cli.checkpoint.tokens import refuse_long
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
TOKENIZER_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# The conversation format `v1`. The original tokenises what follows an image by itself, so that a blank comes first:
# here the template writes it.
_CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro images_of(message) -%}
{%- if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image> \\n' }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set about = namespace(images='') -%}
{%- for message in messages -%}{%- set about.images = about.images + images_of(message) -%}{%- endfor -%}
{%- if messages[0]['role'] != 'system' -%}{{ 'SYSTEM_PROMPT ' }}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ text_of(message) + ' ' }}
{%- elif message['role'] == 'user' -%}
{{ 'USER: ' + images_of(message) + text_of(message) + (END_OF_QUESTION) }}
{%- else -%}{{ 'ASSISTANT: ' + text_of(message) + '</s>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""


@dataclass(frozen=True)
class Words:
    """A tokenizer's files, as a source has them.

    Attributes:
        file: the vocabulary: tokenizer.json or tokenizer.model.
        legacy: the option of `LlamaTokenizer`; without it no blank is put before what follows a special token.
        added: tokens that were added to the vocabulary, by id.
        max_length: the most tokens in a sequence; None if not stated.
    """

    file: Path
    legacy: bool
    added: dict[int, str]
    max_length: int | None

    @classmethod
    def of(cls, folder: Path) -> "Words":
        """Read a tokenizer's files.

        Raises:
            CheckpointError: if there is none, or it is not Llama's.
        """
        files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
        if not files:
            raise CheckpointError(f"{folder} has neither tokenizer.json nor tokenizer.model: download it again")
        path = folder / "tokenizer_config.json"
        config = read_json_if_there(path)
        kind = config.get("tokenizer_class", "LlamaTokenizer")
        if kind not in TOKENIZER_CLASSES:
            raise CheckpointError(
                f"{folder} has a {kind}, so its prompts are not LLaVA-1.5's: expected a LlamaTokenizer in the original "
                "LLaVA layout"
            )
        try:
            added = _added_tokens(folder, config, files[0])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(f"{folder} has a damaged list of added tokens: download it again") from None
        refuse_long(folder, added.values())
        legacy, max_length = config.get("legacy"), config.get("model_max_length")
        if not (max_length is None or (type(max_length) in (int, float) and max_length > 0)):
            raise CheckpointError(f"{path} has an impossible model_max_length: {max_length!r}")
        return cls(
            file=files[0],
            legacy=True if legacy is None else bool(legacy),  # as in transformers 4.31
            added=added,
            max_length=max_length,
        )

    def tokenizer(self, added: list[str]) -> "PreTrainedTokenizerFast":
        """Build the tokenizer, with special tokens of consecutive ids after its own words.

        Args:
            added: the special tokens, in the order of their ids; `<image>` and `<pad>` must be among them.

        Raises:
            MissingExtraError: if it can only be read with packages that are not installed.
            CheckpointError: if it cannot be read at all.
        """
        from tokenizers import AddedToken, processors
        from transformers import PreTrainedTokenizerFast

        backend = self._words()
        # The source's own take the blanks around them, as in the slow tokenizers of transformers 4.31.
        strips = [token not in (IMAGE_TOKEN, PAD_TOKEN) for token in added]
        backend.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False, lstrip=strip, rstrip=strip)
                for token, strip in zip(added, strips, strict=True)
            ]
        )
        bos = backend.token_to_id("<s>")
        if bos is None or backend.token_to_id("</s>") is None:
            raise CheckpointError(f"{self.file} has no <s> and </s>: expected Llama's vocabulary")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
        limit = {} if self.max_length is None else {"model_max_length": self.max_length}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token=PAD_TOKEN,
            extra_special_tokens={"image_token": IMAGE_TOKEN},
            padding_side="left",
            **limit,
        )

    def num_words(self) -> int:
        """Return the size of the vocabulary without added tokens."""
        return self._words().get_vocab_size()

    def _words(self) -> Any:
        """Return a `tokenizers.Tokenizer` with nothing added."""
        from transformers import LlamaTokenizer

        if self.file.suffix == ".model":
            _check_sentencepiece(self.file)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)  # with what counts, and nothing of a config that other versions wrote
            if self.file.suffix == ".json":
                write_json(folder / "tokenizer.json", _without_added(read_json(self.file)))
            else:
                shutil.copy(self.file, folder)
            write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": self.legacy})
            try:
                return LlamaTokenizer.from_pretrained(folder, legacy=self.legacy).backend_tokenizer
            except Exception as error:
                raise CheckpointError(_unreadable(self.file)) from error


def chat_template(router_token: str | None = None) -> str:
    """Return the chat template of the conversation format v1.

    Args:
        router_token: a token that ends every question of a conversation with images; None for none.
    """
    end = "' '" if router_token is None else f"'{router_token} ' if about.images else ' '"
    return _CHAT_TEMPLATE.replace("SYSTEM_PROMPT", SYSTEM_PROMPT.replace("'", "\\'")).replace("END_OF_QUESTION", end)


def write_processor(
    stage: Path,
    tokenizer: "PreTrainedTokenizerFast",
    template: str,
    side: int,
    patch_size: int,
    normalisation: Mapping[str, Any],
    pad_to_square: bool,
    strategy: str = "default",
) -> None:
    """Write tokenizer, image processor and chat template.

    Args:
        stage: the folder to write into.
        tokenizer: the tokenizer, as `Words.tokenizer` builds it.
        template: the template, as `chat_template` returns it.
        side: side of an image, in pixels.
        patch_size: side of the square that becomes one visual token, in pixels.
        normalisation: `image_mean` and `image_std`; CLIP's if they are left out.
        pad_to_square: fill an image up with the mean colour, as LLaVA-1.5 does, or cut its middle out, as CLIP does.
        strategy: `default` if the tower's features have a class token, which is left out, or `full`.
    """
    from transformers import LlavaImageProcessorPil, LlavaProcessor

    images = LlavaImageProcessorPil(
        do_pad=pad_to_square,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        **normalisation,
    )
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=template,
        num_additional_image_tokens=int(strategy == "default"),
    ).save_pretrained(stage)


def _added_tokens(folder: Path, config: dict[str, Any], vocabulary: Path) -> dict[int, str]:
    """Return the tokens that were added to a vocabulary, its own special ones aside, wherever they are noted."""
    added: dict[int, str] = {int(i): token for token, i in read_json_if_there(folder / "added_tokens.json").items()}
    added |= {int(i): entry["content"] for i, entry in config.get("added_tokens_decoder", {}).items()}
    if vocabulary.suffix == ".json":
        added |= {entry["id"]: entry["content"] for entry in read_json(vocabulary).get("added_tokens", [])}
    if not all(isinstance(token, str) for token in added.values()):
        raise TypeError("a token is not text")
    return {i: token for i, token in added.items() if token not in {"<unk>", "<s>", "</s>"}}


def _without_added(data: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json that holds none but the model's own words."""
    words = data["model"]["vocab"]
    return data | {"added_tokens": [entry for entry in data.get("added_tokens", []) if entry["content"] in words]}


def _check_sentencepiece(path: Path) -> None:
    """Check that a tokenizer.model can be read: transformers would go on with an empty vocabulary."""
    for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
        if not _is_installed(module):
            raise MissingExtraError(f"a tokenizer.model (in {path.parent})", package, "original")
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, ValueError):
        raise CheckpointError(_unreadable(path)) from None


def _unreadable(path: Path) -> str:
    return f"{path} cannot be read as Llama's vocabulary: download it again"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
