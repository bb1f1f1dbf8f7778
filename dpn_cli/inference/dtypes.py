"""The dtype that a model is computed in: the checkpoint's own, or float32 where a CPU only emulates that one."""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from rich.filesize import decimal
from torch.nn import functional as F

from dpn_cli.checkpoint.headers import BITS, DTYPES, FLOATS, TORCH_DTYPES, Checkpoint, TensorInfo
from dpn_cli.checkpoint.layout import LlavaLayout, stored_dtype
from dpn_cli.inference.threads import one_thread

AUTO = "auto"
HALVES = {TORCH_DTYPES[DTYPES[name]]: name for name in ("bf16", "fp16")}  # torch's word → the user's
SLOW = 2.0  # times float32's time; emulated products take 4 to 10 times as long, others at most 1.4 times
HEADROOM = 1.25  # times the size of the weights: the rest is for activations
BITS_PER_WEIGHT = {"4bit": 4, "8bit": 8}

_ROUNDS = 5
_INPUTS, _WEIGHT = (64, 512), (512, 512)
_SYSTEM, _MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/meminfo")
_CGROUPS = (  # limit, use and the key in memory.stat of what the kernel can drop: version 2, then 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def compute_dtype(
    checkpoint: Checkpoint,
    layout: LlavaLayout,
    asked: str,
    device: str,
    say: Callable[[str], None],
    *,
    load_in: Literal["4bit", "8bit"] | None = None,
    copies: int = 1,
    beside: int = 0,
) -> str:
    """Return the dtype to load a model in, in torch's words, or `auto` for the checkpoint's own.

    Args:
        checkpoint: the opened checkpoint.
        layout: Layout of the checkpoint.
        asked: `auto` for the fast one, or a key of `DTYPES`.
        device: the device that the model is loaded on.
        say: Function for a message if `auto` is not the checkpoint's dtype, or would not be with more memory.
        load_in: how the decoder's linear layers are quantised on loading.
        copies: number of processes of this machine that each load the model.
        beside: Bytes that each of them loads in addition.
    """
    if asked != AUTO:
        return TORCH_DTYPES[DTYPES[asked]]
    stored = stored_dtype(checkpoint, layout)
    if torch.device(device).type != "cpu" or stored not in HALVES or slowdown(stored) < SLOW:
        return AUTO
    own, wide = (weights_size(checkpoint, layout, dtype, load_in) * copies for dtype in (None, "F32"))
    emulated = f"This CPU emulates {stored}, which takes {slowdown(stored):.1f} times as long as float32"
    if wide * HEADROOM > (free := available_memory() - beside * copies):
        say(
            f"{emulated}, but in float32 the weights take {decimal(wide)} in place of {decimal(own)} and "
            f"{decimal(free)} are free: computing in {stored}."
        )
        return AUTO
    say(
        f"{emulated}: computing in float32, with {decimal(wide)} of weights in memory in place of {decimal(own)}; "
        f"--dtype {HALVES[stored]} keeps the checkpoint's."
    )
    return TORCH_DTYPES["F32"]


@cache
def slowdown(dtype: str) -> float:
    """Return how many times as long as in float32 this CPU takes for a product in a dtype, measured in milliseconds.

    What the processor says of itself is no answer: some libraries have no kernel for instructions that it has, and
    others convert so fast that it does not need them.
    """
    least = dict.fromkeys((dtype, TORCH_DTYPES["F32"]), float("inf"))
    pairs = {name: [torch.ones(size, dtype=getattr(torch, name)) for size in (_INPUTS, _WEIGHT)] for name in least}
    with one_thread(), torch.inference_mode():
        for _ in range(_ROUNDS):
            for name, pair in pairs.items():
                start = time.perf_counter()
                F.linear(*pair)
                least[name] = min(least[name], time.perf_counter() - start)
    return least[dtype] / least[TORCH_DTYPES["F32"]]


def available_memory() -> int:
    """Return how many bytes this process can still take, of the machine's or of the container's that it runs in."""
    free = _number_after("MemAvailable:", _MEMINFO) * 1024
    for limit, use, droppable in _CGROUPS:
        try:
            room = int((_SYSTEM / limit).read_text()) - int((_SYSTEM / use).read_text())
            free = min(free, room + _number_after(droppable, (_SYSTEM / use).with_name("memory.stat")))
        except (OSError, ValueError):  # there is no such file, or no limit
            continue
    return free


def _number_after(word: str, file: Path) -> int:
    words = file.read_text().split()
    return int(words[words.index(word) + 1])


def loaded_size(
    checkpoint: Checkpoint, layout: LlavaLayout, dtype: str, load_in: Literal["4bit", "8bit"] | None
) -> int:
    """Return the size of a model's weights in memory, loaded in what `compute_dtype` has returned."""
    stored = None if dtype == AUTO else next(key for key, value in TORCH_DTYPES.items() if value == dtype)
    return weights_size(checkpoint, layout, stored, load_in)


def weights_size(
    checkpoint: Checkpoint, layout: LlavaLayout, dtype: str | None, load_in: Literal["4bit", "8bit"] | None
) -> int:
    """Return the size of a model's weights in memory, their floats in a dtype of safetensors, or as they are stored."""
    decoder = f"{layout.text_prefix}layers."

    def bits(tensor: TensorInfo) -> int:
        if load_in and tensor.name.startswith(decoder) and len(tensor.shape) == 2:
            return BITS_PER_WEIGHT[load_in]
        return BITS[dtype if dtype and tensor.dtype in FLOATS else tensor.dtype]

    return sum(tensor.num_values * bits(tensor) for tensor in checkpoint.tensors.values()) // 8
