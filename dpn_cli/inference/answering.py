"""Answer one question about images, and measure what it took."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, TextStreamer

from dpn_cli.data.encoding import prompts
from dpn_cli.data.samples import Sample
from dpn_cli.inference.scoring import broken
from dpn_cli.modeling.wrapper import PyramidGenerationMixin
from dpn_cli.pyramid.config import Route
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.experts import num_tokens
from dpn_cli.pyramid.route import format_route


@dataclass(frozen=True)
class Answer:
    """An answer and its cost.

    Attributes:
        text: the answer, without special tokens.
        route: the expert taken at every site, by index.
        experts: the experts of that route, by name.
        flops_fraction: fraction of the original LLM's prefill FLOPs, routers included.
        visual_tokens: visual tokens in every segment of the decoder, over all images.
        text_tokens: text tokens of the prompt.
        new_tokens: number of generated tokens.
        first_token_s: seconds from the encoded prompt to the first token, the vision tower included.
        total_s: seconds to the last token.
    """

    text: str
    route: Route
    experts: str
    flops_fraction: float
    visual_tokens: tuple[int, ...]
    text_tokens: int
    new_tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Return the decoding rate after the first token; None if there was no other."""
        seconds = self.total_s - self.first_token_s
        return (self.new_tokens - 1) / seconds if self.new_tokens > 1 and seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def answer(
    model: PyramidGenerationMixin,
    processor: Any,
    sample: Sample,
    max_new_tokens: int,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Answer the first question of a sample, greedily.

    Args:
        model: the model, in eval mode, with its budget or route set.
        processor: the checkpoint's processor.
        sample: one question and its images.
        max_new_tokens: the most tokens to generate.
        on_text: called with every piece of the answer as soon as it is certain.

    Raises:
        DataError: if an image cannot be read, or the model's answer is no finite number.
        CheckpointError: if the model's weights are to blame for that.
        ValueError: if the forced route does not fit these images.
    """
    inputs = prompts([sample], processor, model.device)
    streamer = _Streamer(processor.tokenizer, on_text)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=streamer,
            logits_processor=[_Finite(model)],
        )
    total_s = time.perf_counter() - start

    pyramid, [route], [grids] = model.pyramid, model.last_routes, model.last_grids
    visual_tokens = tuple(map(num_tokens, pyramid.walk(route, grids)))
    text_tokens = inputs["input_ids"].shape[1] - visual_tokens[0]
    return Answer(
        text="".join(streamer.pieces).strip(),
        route=route,
        experts=format_route(route, pyramid.sites),
        flops_fraction=flops_fraction(model.text_model.shape, pyramid, route, grids, text_tokens),
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        new_tokens=len(streamer.times),
        first_token_s=streamer.times[0] - start,
        total_s=total_s,
    )


class _Finite(LogitsProcessor):
    """Stops at logits that are no numbers, of which the first token would be taken."""

    def __init__(self, model: PyramidGenerationMixin) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return logits as they are."""
        if scores.isnan().any():
            raise broken("the question", self.model)
        return scores


class _Streamer(TextStreamer):
    """Hands text on as it becomes certain, without leading blanks, and notes when each token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.pieces: list[str] = []
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token after another."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece of the answer on."""
        text = text if self.pieces else text.lstrip()
        if text:
            self.pieces.append(text)
            self.on_text(text)
