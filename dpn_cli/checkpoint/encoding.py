"""Does a folder's tokenizer.json encode text in bounded time and memory? No torch.

Its regular expressions and replacements are a stranger's: a few lines of them can ask for minutes or gigabytes. So
short texts are encoded in a child process first.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.bounded import OverLimitError, run_bounded
from dpn_cli.checkpoint.headers import TOKENIZER_FILE, read_json
from dpn_cli.checkpoint.panics import no_panic
from dpn_cli.checkpoint.template import QUESTION
from dpn_cli.errors import CheckpointError
from dpn_cli.limits import MAX_PADDING, TOKENIZER_BYTES, TOKENIZER_BYTES_A_SECOND, TOKENIZER_SECONDS

# What regular expressions with nested repeats cannot match, and only find out after exponentially many tries.
_RUNS = ("a", "word ", "1", " ", "\n", "!", "é", "漢")
TEXTS = (QUESTION, *(f"{run * 48}\x01" for run in _RUNS))

# In an order in which each can be tried with those before it.
_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")


def validate_encoding(folder: Path) -> None:
    """Check that a folder's tokenizer.json, if it has one, encodes and decodes short texts.

    Raises:
        CheckpointError: if it does not, or takes too long or too much memory; names the part that is to blame.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return
    if fault := _fault(path.read_text(encoding="utf-8")):
        guilty = next(_guilty(read_json(path)), "version")
        raise CheckpointError(
            f"{path} has a {guilty} that {fault}: correct it, or take the file from the model that this one was made "
            "from"
        )


def _guilty(data: dict[str, Any]) -> Iterator[str]:
    """Yield the parts with which a tokenizer that is put together of them fails, the first one that does first."""
    tried: dict[str, Any] = {}
    for key in (*_PARTS, *(key for key in data if key not in _PARTS)):
        tried[key] = data.get(key)
        if _fault(json.dumps(tried)):
            yield key


@lru_cache(maxsize=4)
def _fault(content: str) -> str | None:
    """Return what is wrong with a tokenizer.json, as a verb and its object; None if it encodes all texts."""
    from tokenizers import Tokenizer

    def try_all() -> str:
        with no_panic():
            tokenizer: Any = Tokenizer.from_str(content)
            for text in TEXTS:
                ids = tokenizer.encode(text).ids
                if len(ids) > MAX_PADDING:
                    return f"makes {len(ids):,} tokens of {len(text)} characters"
            tokenizer.decode(range(tokenizer.get_vocab_size()), skip_special_tokens=False)
        return ""

    seconds = TOKENIZER_SECONDS + len(content.encode()) // TOKENIZER_BYTES_A_SECOND
    try:
        return run_bounded(try_all, seconds, TOKENIZER_BYTES) or None
    except OverLimitError:
        return f"takes more than {seconds} s or {TOKENIZER_BYTES / 1e6:.0f} MB for short texts"
    except RuntimeError as error:
        return f"fails with {str(error)!r}"
