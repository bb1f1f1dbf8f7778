"""The chat template of a folder: where transformers keeps it, and whether it shows images. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.bounded import OverLimitError, run_bounded
from dpn_cli.checkpoint.headers import IMAGES_FILE, PROCESSOR_FILE, TOKENIZER_CONFIG_FILE, read_json_if_there
from dpn_cli.checkpoint.writer import write_json
from dpn_cli.errors import CheckpointError, DpnError, UsageError
from dpn_cli.limits import MAX_PROMPT_CHARACTERS, TEMPLATE_BYTES, TEMPLATE_SECONDS

TEMPLATE_FILE = "chat_template.jinja"
OLD_TEMPLATE_FILE = "chat_template.json"

QUESTION = "What is this?"

_ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
_ANSWERED = {"role": "assistant", "content": [{"type": "text", "text": "A bird."}]}
_SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that writes conversations.

    Attributes:
        text: the template itself.
        path: the file that it comes from.
        is_found: whether transformers finds it there for a processor.
        fault: the error to raise if it is of no use.
    """

    text: str
    path: Path
    is_found: bool = False
    fault: type[DpnError] = CheckpointError

    @classmethod
    def find(cls, folder: Path) -> "ChatTemplate":
        """Return the template that a folder's processor has, else its tokenizer's.

        Raises:
            CheckpointError: if there is neither.
        """
        for file in (PROCESSOR_FILE, OLD_TEMPLATE_FILE):
            if text := _default(read_json_if_there(folder / file).get("chat_template")):
                return cls(text, folder / file, is_found=True)
        if (folder / TEMPLATE_FILE).is_file():
            return cls(_read_text(folder / TEMPLATE_FILE, CheckpointError), folder / TEMPLATE_FILE, is_found=True)
        if text := _default(read_json_if_there(folder / TOKENIZER_CONFIG_FILE).get("chat_template")):
            return cls(text, folder / TOKENIZER_CONFIG_FILE)
        if not any((folder / file).is_file() for file in (PROCESSOR_FILE, IMAGES_FILE, TOKENIZER_CONFIG_FILE)):
            raise CheckpointError(
                f"{folder} holds a model without its tokenizer and image processor: save them there, too, with "
                "`processor.save_pretrained`, or copy their files from the model that it was made from"
            )
        raise CheckpointError(
            f"{folder} has no chat template, neither as {TEMPLATE_FILE} nor as chat_template in "
            f"{TOKENIZER_CONFIG_FILE}: pass a Jinja template that writes its prompts, with `dpn convert "
            "--chat-template FILE`"
        )

    @classmethod
    def read(cls, path: Path) -> "ChatTemplate":
        """Read a template that the user gives in the place of a folder's own."""
        return cls(_read_text(path, UsageError), path, fault=UsageError)

    def validate(self, image_token: str, special_tokens: Mapping[str, str]) -> None:
        """Check that it writes a question about an image, with one image token in it.

        Args:
            image_token: the placeholder of an image.
            special_tokens: the tokenizer's special tokens, which templates use by name (`bos_token`).

        Raises:
            CheckpointError, UsageError: if it does not.
        """
        fault = "does not show images"
        try:
            text = self.prompt(special_tokens)
        except OverLimitError:
            found = f"takes more than {TEMPLATE_SECONDS} s or {TEMPLATE_BYTES / 1e6:.0f} MB"
        except RuntimeError as error:
            found = f"fails with {str(error)!r}"
        else:
            if text.count(image_token) == 1 and QUESTION in text:
                return
            found = f"writes {text[:200]!r}"
            fault = fault if text.count(image_token) != 1 else "does not write questions as they are"
        raise self.fault(
            f"the chat template in {self.path} {fault}: for an image and a question it {found}, expected "
            f"{image_token} once and the question; pass one that does, with `dpn convert --chat-template FILE`"
        )

    def prompt(self, special_tokens: Mapping[str, str]) -> str:
        """Return what it writes for `QUESTION` about an image, up to where the answer begins.

        Raises:
            OverLimitError: if it takes too long or too much memory, for this or for a longer conversation.
            RuntimeError: with the message of what it raises.
        """
        return _prompt(self.text, tuple(special_tokens.items()))

    def write(self, folder: Path) -> None:
        """Make it the template of a folder's processor."""
        (folder / TEMPLATE_FILE).write_text(self.text, encoding="utf-8")
        (folder / OLD_TEMPLATE_FILE).unlink(missing_ok=True)  # both would win
        processor = read_json_if_there(folder / PROCESSOR_FILE)
        if processor.pop("chat_template", None) is not None:
            write_json(folder / PROCESSOR_FILE, processor)


@lru_cache(maxsize=8)
def _prompt(template: str, special_tokens: tuple[tuple[str, str], ...]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(template: str, *messages: dict[str, Any]) -> str:
        [text], _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True, **dict(special_tokens)
        )
        return str(text)

    def try_all() -> str:
        text = render(template, _ASKED)
        for others in ([_ASKED, _ANSWERED, _ASKED], [_SYSTEM, _ASKED]):
            try:
                render(template, *others)
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001 - what it refuses with words is found when data have it
                pass
        return text[:MAX_PROMPT_CHARACTERS]

    render("", _ASKED)  # what rendering imports is imported here, without limits
    return run_bounded(try_all, TEMPLATE_SECONDS, TEMPLATE_BYTES)


def _default(stored: Any) -> str | None:
    """Return the template that is used where several are stored, by name or as a list."""
    if isinstance(stored, list):
        stored = {each.get("name"): each.get("template") for each in stored if isinstance(each, dict)}
    if isinstance(stored, dict):
        stored = stored.get("default")
    return stored if isinstance(stored, str) else None


def _read_text(path: Path, fault: type[DpnError]) -> str:
    if not path.is_file():
        raise fault(f"{path} is a pipe or a device, expected a file with a Jinja template")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise fault(f"{path} is not UTF-8 text, expected a Jinja template") from None
