"""The tokens of a folder's tokenizer, checked against its model's config. No torch, and no tokenizer is loaded."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import (
    GENERATION_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    read_json,
    read_json_if_there,
)
from dpn_cli.errors import CheckpointError
from dpn_cli.limits import MAX_EXTRA_TOKENS, MAX_PADDING, MAX_TOKEN_CHARACTERS

DEFAULT_IMAGE_TOKEN = "<image>"  # of transformers' processors

_ADDED_FILE = "added_tokens.json"
_VOCABULARIES = ("tokenizer.model", "vocab.json", "tiktoken.model", "tekken.json")  # without the tokens added to them
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer's files say.

    Attributes:
        folder: the tokenizer's folder.
        file: the file that has the ids.
        ids: ids by token, without those of a vocabulary that only its own library reads.
        is_whole: whether `ids` has every token.
        special: the special tokens, by purpose (`eos_token`).
        special_file: the file that names the special tokens.
    """

    folder: Path
    file: str
    ids: Mapping[str, int]
    is_whole: bool
    special: Mapping[str, str]
    special_file: str

    @classmethod
    def of(cls, folder: Path) -> "Tokens":
        """Read a tokenizer's files.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        config = read_json_if_there(folder / TOKENIZER_CONFIG_FILE)
        noted, special_file = config, TOKENIZER_CONFIG_FILE
        if "added_tokens_decoder" not in config and (folder / SPECIAL_TOKENS_FILE).is_file():
            noted, special_file = config | read_json(folder / SPECIAL_TOKENS_FILE), SPECIAL_TOKENS_FILE
        named = noted | noted["extra_special_tokens"] if isinstance(noted.get("extra_special_tokens"), dict) else noted
        contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        special = {key: text for key, text in contents.items() if key.endswith("_token") and isinstance(text, str)}
        path = folder / TOKENIZER_FILE
        if not path.is_file() and not any((folder / name).is_file() for name in _VOCABULARIES):
            raise CheckpointError(f"{folder} has no {TOKENIZER_FILE} and no {_VOCABULARIES[0]}: download it again")
        _refuse_extra(folder / special_file, noted)
        with _damaged(folder / TOKENIZER_CONFIG_FILE, "added_tokens_decoder"):
            added = {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
        refuse_long(folder / TOKENIZER_CONFIG_FILE, added)
        refuse_long(folder / special_file, special.values())
        if path.is_file():
            data = read_json(path)
            _refuse_padding(path, data.get("padding"))
            with _damaged(path, "model.vocab or added_tokens"):
                return cls(folder, TOKENIZER_FILE, added | _all_ids(data), True, special, special_file)
        with _damaged(folder / _ADDED_FILE, "ids"):
            added |= {token: int(i) for token, i in read_json_if_there(folder / _ADDED_FILE).items()}
        refuse_long(folder / _ADDED_FILE, added)
        return cls(folder, TOKENIZER_CONFIG_FILE, added, False, special, special_file)

    def validate_ids(self, config: Mapping[str, Any], num_rows: int) -> None:
        """Check that every token has its row in the embedding.

        Args:
            config: the model's config.json.
            num_rows: number of rows of the embedding.

        Raises:
            CheckpointError: if a token, or a key of a config, has none; names it.
        """
        last, i = max(self.ids.items(), key=lambda item: item[1], default=("", -1))
        if i >= num_rows:
            raise CheckpointError(
                f"{self.folder / self.file} gives {last!r} the id {i}, but the embedding ends at {num_rows - 1}: "
                "resize the model's embedding, or take the tokenizer that belongs to it"
            )
        for file, key, value in self._noted_ids(config):
            if value >= num_rows:
                raise CheckpointError(
                    f"{self.folder / file} has the {key} {value}, but the embedding ends at {num_rows - 1}: they do "
                    "not belong together"
                )

    def image_token(self, config: Mapping[str, Any], stated: Any) -> tuple[str, bool]:
        """Return the placeholder of an image, and whether it has yet to be stated.

        Args:
            config: the model's config.json, which has the token's id.
            stated: the token that the processor states; the tokenizer's own wins.

        Raises:
            CheckpointError: if the tokenizer has it not, or under another id.
        """
        key = "image_token_index" if "image_token_index" in config else "image_token_id"
        named = self.special.get("image_token") or (stated if isinstance(stated, str) else None)
        token = named or DEFAULT_IMAGE_TOKEN
        if named is None and token not in self.ids:
            token = next((each for each, i in self.ids.items() if i == config[key]), token)
        if self.ids.get(token) != config[key]:
            has = f"gives {token!r} the id {self.ids[token]}" if token in self.ids else f"has no token {token!r}"
            raise CheckpointError(
                f"{self.folder / 'config.json'} has the {key} {config[key]}, but {self.file} {has}: they do not belong "
                "together"
            )
        return token, named is None

    def missing(self, config: Mapping[str, Any], image_token: str) -> Iterator[tuple[tuple[str, str], str]]:
        """Yield the special tokens that are needed and not there, by file and key: one that ends and one that pads.

        Any will do for padding, which is masked, but that of an image.

        Raises:
            CheckpointError: if config.json does not imply one.
        """
        eos = self.special.get("eos_token")
        if eos is None and (eos := self._by_id(config, "eos_token_id")) is not None:
            yield (self.special_file, "eos_token"), eos
        if self.is_whole and eos not in self.ids:
            raise CheckpointError(
                f"{self.folder / self.special_file} has the eos_token {eos!r}, which is not in {self.file}: name the "
                "token that ends an answer"
            )
        pad = self.special.get("pad_token")
        if pad is None or pad == image_token or (self.is_whole and pad not in self.ids):
            noted = self._by_id(config, "pad_token_id")
            pad = eos if noted in (None, image_token) else noted
            if pad is not None:
                yield (self.special_file, "pad_token"), pad

    def _by_id(self, config: Mapping[str, Any], key: str) -> str | None:
        """Return the token whose id the model's configs have under a key."""
        noted = [value for _, each, value in self._noted_ids(config) if each.endswith(key)]
        return next((token for value in noted for token, i in self.ids.items() if i == value), None)

    def _noted_ids(self, config: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
        """Yield file, key and value of every id that the model's configs have for a special token."""
        generation = read_json_if_there(self.folder / GENERATION_FILE)
        text = config["text_config"]
        for file, prefix, data in (
            (GENERATION_FILE, "", generation), ("config.json", "text_config.", text), ("config.json", "", config),
        ):  # fmt: skip
            for key in _ID_KEYS:
                values = data.get(key)
                yield from (
                    (file, prefix + key, value)
                    for value in (values if isinstance(values, list) else [values])
                    if type(value) is int
                )


@contextmanager
def _damaged(path: Path, what: str) -> Iterator[None]:
    """Raise a CheckpointError where a file is not made as expected."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} has damaged {what}: download it again") from None


def _refuse_extra(path: Path, noted: Mapping[str, Any]) -> None:
    """Refuse a tokenizer with more special tokens than transformers adds in seconds."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(extra := noted.get(key), list | dict) and len(extra) > MAX_EXTRA_TOKENS:
            raise CheckpointError(f"{path} has {len(extra):,} {key}, expected at most {MAX_EXTRA_TOKENS:,}")


def refuse_long(path: Path, tokens: Iterable[Any]) -> None:
    """Refuse tokens so long that adding them takes a tokenizer many seconds.

    Args:
        path: the file that has them.
        tokens: Tokens that it adds to the vocabulary.

    Raises:
        CheckpointError: if one is.
    """
    longest = max((len(token) for token in tokens if isinstance(token, str)), default=0)
    if longest > MAX_TOKEN_CHARACTERS:
        raise CheckpointError(
            f"{path} has a token of {longest:,} characters, expected at most {MAX_TOKEN_CHARACTERS:,}"
        )


def _refuse_padding(path: Path, padding: Any) -> None:
    """Refuse a tokenizer that would make every prompt a huge one."""
    padding = padding if isinstance(padding, dict) else {}
    strategy = padding.get("strategy")
    lengths = [strategy.get("Fixed") if isinstance(strategy, dict) else None, padding.get("pad_to_multiple_of")]
    if any(type(length) is int and length > MAX_PADDING for length in lengths):
        raise CheckpointError(f"{path} has a padding to more than {MAX_PADDING:,} tokens: leave it out")


def _all_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return every token of a tokenizer.json: words by id, or in their order, and what was added."""
    words = tokenizer["model"]["vocab"]
    ids = words if isinstance(words, dict) else {word: i for i, (word, _) in enumerate(words)}
    ids = ids | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}
    if not all(type(i) is int for i in ids.values()):
        raise TypeError("an id is not a number")
    return ids
