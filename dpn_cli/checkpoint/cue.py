"""What a chat template writes between a question and its answer. No torch."""

from pathlib import Path

from dpn_cli.checkpoint.headers import TOKENIZER_FILE
from dpn_cli.checkpoint.panics import no_panic
from dpn_cli.checkpoint.template import QUESTION, ChatTemplate
from dpn_cli.checkpoint.tokens import Tokens
from dpn_cli.errors import CheckpointError


def answer_cue(folder: Path) -> tuple[int, ...]:
    """Return it as token ids, without blanks in front, which may be part of the question's last token.

    Empty where the template writes nothing there, or the tokenizer is one that only its own library reads.

    Args:
        folder: a checkpoint whose processor is complete.

    Raises:
        CheckpointError: if tokenizer.json is damaged.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return ()
    from tokenizers import Tokenizer

    text = ChatTemplate.find(folder).prompt(Tokens.of(folder).special)
    start = len(text) - len(text.rpartition(QUESTION)[2].lstrip())
    try:
        with no_panic():
            encoded = Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False)
    except Exception as error:  # noqa: BLE001 - the library raises nothing more special
        raise CheckpointError(f"{path} is damaged ({error}): download it again") from None
    return tuple(token for token, (_, end) in zip(encoded.ids, encoded.offsets, strict=True) if end > start)
