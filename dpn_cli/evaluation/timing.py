"""What one generation takes: time per phase, memory, cache, and the attention kernels that ran."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.streamers import BaseStreamer

from dpn_cli.inference.scoring import broken
from dpn_cli.modeling.renamed import CACHE
from dpn_cli.modeling.wrapper import PyramidGenerationMixin

Clock = Callable[[], float]
_CLEAR_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Timing:
    """One generation for a batch, from encoded prompts on.

    Attributes:
        vision_s: seconds in vision tower and projector; 0 without images.
        prefill_s: seconds from there to the first token of every sample: the language model's prefill and `lm_head`.
        decode_s: seconds per token after the first, the mean for the whole batch; None if there is no other token.
        kv_bytes: bytes of the KV cache at the end.
        peak_bytes: the most bytes allocated on the GPU, or resident in memory; None if the system cannot tell.
    """

    vision_s: float
    prefill_s: float
    decode_s: float | None
    kv_bytes: int
    peak_bytes: int | None

    @property
    def first_token_s(self) -> float:
        """Time to the first token."""
        return self.vision_s + self.prefill_s


def time_generation(
    model: PyramidGenerationMixin, inputs: Mapping[str, torch.Tensor], new_tokens: int, clock: Clock = time.perf_counter
) -> tuple[Timing, torch.Tensor]:
    """Generate exactly `new_tokens` tokens, greedily, and measure it.

    Args:
        model: the model, in eval mode.
        inputs: Arguments of `generate`; they are brought to the model's device first.
        new_tokens: number of tokens to generate, at least one.
        clock: Function that returns the time in seconds.

    Returns:
        The timing, and the logits of the first token, [B, vocabulary].

    Raises:
        CheckpointError: if the model's weights hold NaN, so that its logits are NaN.
        DataError: if the logits are NaN for another reason.
    """
    inputs = {name: values.to(model.device) for name, values in inputs.items()}
    now = partial(done_at, model.device, clock)
    tokens = _TokenClock(now)
    with _vision_clock(model, now) as vision_s, _peak_memory(model.device) as peak_bytes:
        start = now()
        output = model.generate(
            **inputs, streamer=tokens, eos_token_id=None, max_new_tokens=new_tokens, do_sample=False,
            num_beams=1, use_cache=True, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    if output.logits[0].isnan().any():
        raise broken("a prompt", model)
    first, last = tokens.times[0], tokens.times[-1]
    timing = Timing(
        vision_s=sum(vision_s),
        prefill_s=first - start - sum(vision_s),
        decode_s=(last - first) / (new_tokens - 1) if new_tokens > 1 else None,
        kv_bytes=sum(t.nbytes for layer in output[CACHE].layers for t in (layer.keys, layer.values)),
        peak_bytes=peak_bytes[0] if peak_bytes else None,
    )
    return timing, output.logits[0]


@contextmanager
def attention_kernels(model: PyramidGenerationMixin) -> Iterator[set[str]]:
    """Yield a set that takes the names of the fused attention kernels that the language model runs meanwhile.

    It stays empty where attention is plain matrix products.
    """
    log = _KernelLog()
    text_model: Any = model.text_model
    hooks = [
        text_model.register_forward_pre_hook(lambda *_: log.__enter__() and None),
        text_model.register_forward_hook(lambda *_: log.__exit__(None, None, None), always_call=True),
    ]
    try:
        yield log.seen
    finally:
        for hook in hooks:
            hook.remove()


class _KernelLog(TorchDispatchMode):
    """Notes the operators whose name speaks of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name or "flash_attn" in name:
            self.seen.add(name.strip("_"))
        return func(*args, **(kwargs or {}))


class _TokenClock(BaseStreamer):
    """Notes when each token has come; `generate` hands it the prompt first."""

    def __init__(self, now: Clock) -> None:
        self.now = now
        self.is_prompt = True
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token of every sample after another."""
        if not self.is_prompt:
            self.times.append(self.now())
        self.is_prompt = False

    def end(self) -> None:
        """Do nothing: the last token has been noted."""


def done_at(device: torch.device, clock: Clock) -> float:
    """Return the time at which all work given to a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


@contextmanager
def _vision_clock(model: PyramidGenerationMixin, now: Clock) -> Iterator[list[float]]:
    """Yield a list that takes, for every use, the seconds from the vision tower's start to the projector's end."""
    starts: list[float] = []
    seconds: list[float] = []
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    hooks = [
        tower.register_forward_pre_hook(lambda *_: starts.append(now())),
        projector.register_forward_hook(lambda *_: seconds.append(now() - starts[-1])),
    ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds, in the end, the peak memory in bytes; it stays empty where that cannot be known."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    known = _reset_peak_rss()
    yield peak
    if known:
        peak.append(_peak_rss())


def _reset_peak_rss() -> bool:
    try:
        _CLEAR_PEAK.write_text("5")  # proc(5): sets the peak resident set size to the current one
    except OSError:
        return False
    return True


def _peak_rss() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
