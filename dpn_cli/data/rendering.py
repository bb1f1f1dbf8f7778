"""Conversations as the checkpoint's chat template writes them, in pieces that are tokenised one by one."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from dpn_cli.checkpoint.panics import no_panic
from dpn_cli.data.samples import Sample
from dpn_cli.errors import DataError


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation that is tokenised on its own.

    Attributes:
        text: the question, or the empty string.
        tokens: token ids, with one placeholder per image.
        images: number of images shown in the question.
        labelled: whether the model is to predict it.
    """

    text: str
    tokens: list[int]
    images: int = 0
    labelled: bool = False


def chat_prompt(processor: Any, sample: Sample, turn: int) -> str:
    """Render a conversation up to one turn's question and the cue for its answer.

    A system message that the chat template refuses or leaves out goes before the first question.

    Raises:
        DataError: if the template cannot render the conversation.
    """
    return _render(processor, sample, turn, is_answered=False)


def prompt_ids(processor: Any, text: str) -> list[int]:
    """Return the tokens of a rendered prompt, with the special tokens that go before it."""
    ids: list[int] = processor.tokenizer.encode(text, add_special_tokens=adds_special(processor, text))
    return ids


def adds_special(processor: Any, text: str) -> bool:
    """Tell whether the tokenizer is to add its special tokens to a rendered prompt.

    Not where the template has written the first of them itself, as that of Llama 3 does. Source: transformers,
    `ProcessorMixin.apply_chat_template`.
    """
    first = processor.tokenizer.bos_token
    return not (first and text.startswith(first))


def pieces_of(sample: Sample, processor: Any, answer_tokens: int) -> Iterator[Piece]:
    """Yield the questions and answers of a conversation, up to one without an answer or a shortened one."""
    tokenizer = processor.tokenizer
    last_shown = max((i for i, turn in enumerate(sample.turns) if turn.images), default=0)
    text = closing = ""
    for i, turn in enumerate(sample.turns):
        before, text = text, chat_prompt(processor, sample, i)
        question = text if i == 0 else _after(text, before, str(sample.turns[i - 1].answer))
        if question is None:
            raise DataError(f"sample {sample.id}: the chat template does not keep earlier turns as they were")
        question = question.removeprefix(closing)  # the answer has it
        with _encoded(sample):
            tokens = tokenizer.encode(question, add_special_tokens=False) if i else prompt_ids(processor, question)
        yield Piece(question, tokens, turn.images)
        if turn.answer is None:
            return
        gap = "" if text[-1:].isspace() else " "
        with _encoded(sample):
            answer = tokenizer.encode(f"{gap}{turn.answer}", add_special_tokens=False)
        labelled = i >= last_shown
        if labelled and len(answer) > answer_tokens:
            yield Piece("", answer[:answer_tokens], labelled=True)
            return
        closing = _closing(processor, sample, i, text)
        yield Piece("", [*answer, tokenizer.convert_tokens_to_ids(closing)], labelled=labelled)


def _render(processor: Any, sample: Sample, turn: int, is_answered: bool) -> str:
    """Render a conversation up to the cue for one turn's answer, or up to what is written after that answer."""
    messages: list[dict[str, Any]] = []
    for i, each in enumerate(sample.turns[: turn + 1]):
        content = [{"type": "image"}] * each.images
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": each.question}]})
        if i < turn or is_answered:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": each.answer}]})
    if sample.system:
        system = {"role": "system", "content": [{"type": "text", "text": sample.system}]}
        with suppress(Exception):  # a template may raise whatever it likes
            text: str = processor.apply_chat_template([system, *messages], add_generation_prompt=not is_answered)
            if sample.system in text:
                return text
        messages[0]["content"][-1]["text"] = f"{sample.system}\n{sample.turns[0].question}"
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=not is_answered)
    except Exception as error:  # noqa: BLE001 - a template may raise whatever it likes
        raise DataError(f"sample {sample.id}: the chat template rejects it: {error}") from None
    return text


def _closing(processor: Any, sample: Sample, turn: int, prompt: str) -> str:
    """Return the special token that the template writes after an answer, else the tokenizer's end of sequence."""
    tokenizer = processor.tokenizer
    rest = _after(_render(processor, sample, turn, is_answered=True), prompt, str(sample.turns[turn].answer)) or ""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [token for token in special if rest.lstrip().startswith(token)]
    return max(found, key=len, default=str(tokenizer.eos_token))


@contextmanager
def _encoded(sample: Sample) -> Iterator[None]:
    """Raise a DataError where the tokenizer gives up on a text."""
    try:
        with no_panic():
            yield
    except (RuntimeError, TypeError) as error:  # the latter of half characters
        raise DataError(f"sample {sample.id} cannot be encoded by the tokenizer: {error}") from None


def _after(text: str, before: str, answer: str) -> str | None:
    """Return what follows an answer in a longer prompt; None if the prompt before it is not there, blanks aside."""
    kept = before.rstrip()
    rest = text[len(kept) :].lstrip()
    return rest.removeprefix(answer) if text.startswith(kept) and rest.startswith(answer) else None
