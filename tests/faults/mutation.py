"""Random damage to JSON and bytes, from a seed."""

import copy
import json
import random
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 64, 2**31, 2**63, 10**30, -(2**63), 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "x" * 5000, "1", "\ud800", "\x00", "ü\n", "../x", "/etc/passwd", "../../x.safetensors", "llava", "llama",
    "mistral", "qwen2", "siglip_vision_model", "F16", "I8", "F4", "BOOL", [], {}, [[]], [None], [1, 2], ["x"], [-1, -2],
    {"x": {}}, {"model_type": "llama"}, [10**9] * 3, 2_000_000, 10**7, 10**9, [1] * 100_000, [2**40] * 100_000,
)  # fmt: skip

# What is small and asks for minutes or gigabytes, wherever it gets into a file.
NOISE = (
    b"[" * 50_000, b'{"x":' * 500, b"\x00", b"\xff\xfe", b"9" * 5000, b",", b"\n" * 100_000, b" \r\n" * 50_000,
    b'"' + b'\\"' * 50_000, b'"' + b"\\" * 50_001,
)  # fmt: skip
ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise("abcdefghi")
)
MERGE_BOMB = (
    "a: &a {"
    + ", ".join(f"k{i}: v" for i in range(9))
    + "}\n"
    + "\n".join(f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}" for before, name in pairwise("abcdefghi"))
)
LOOPS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set all = namespace(x='x') %}{% for i in range(99) %}{% set all.x = all.x + all.x %}{% endfor %}",
    "{{ 'x' * 10**11 }}",
)
YAML = (ALIAS_BOMB, MERGE_BOMB, "a: &a [*a, *a]", "[" * 5000, "date: 2024-99-99", "x: !!int y", "? [a]\n: b")


def mutate_json(data: Any, chance: random.Random) -> Any:
    """Return a copy in which one to three places hold something else."""
    data = copy.deepcopy(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(data))
        if not places:
            return chance.choice(HOSTILE)
        parent, key = chance.choice(places)
        how = chance.random()
        if how < 0.15:
            del parent[key]
        elif how < 0.3:
            other, source = chance.choice(places)
            parent[key] = copy.deepcopy(other[source]) if source in _keys(other) else None
        elif how < 0.4 and isinstance(parent, dict):
            parent[str(chance.choice(HOSTILE))] = parent.pop(key)
        elif how < 0.5 and type(parent[key]) is int:
            parent[key] += chance.choice((-1, 1, 2**20))
        else:
            parent[key] = copy.deepcopy(chance.choice(HOSTILE))
    return data


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    """Return the bytes with some flipped, cut out, doubled or put in between."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        start = chance.randrange(len(content) + 1)
        stop = min(len(content), start + chance.choice((1, 4, 100)))
        how = chance.randrange(4)
        if how == 0:
            content[start:stop] = chance.randbytes(stop - start)
        elif how == 1:
            del content[start : chance.choice((stop, len(content)))]
        elif how == 2:
            content[start:start] = content[start:stop] * chance.choice((1, 2, 1000))
        else:
            content[start:start] = chance.choice(NOISE)
    return bytes(content)


def mutate_header(content: bytes, chance: random.Random) -> bytes:
    """Return a safetensors file with another header, of the right length most of the time."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length], content[8 + length :]
    raw = json.dumps(mutate_json(json.loads(header), chance)).encode() if chance.random() < 0.7 else b""
    raw = raw or mutate_bytes(header, chance)
    said = len(raw) if chance.random() < 0.9 else chance.choice((0, 1, len(raw) + 1, 2**31, 2**40, 2**63, 99_999_999))
    return struct.pack("<Q", said) + raw + body


def mutate_lines(content: bytes, hostile: Sequence[str], chance: random.Random) -> bytes:
    """Return text with something put between two of its lines."""
    lines = content.decode().split("\n")
    lines.insert(chance.randrange(len(lines) + 1), chance.choice(hostile))
    return "\n".join(lines).encode()


def mutated(name: str, content: bytes, chance: random.Random) -> bytes:
    """Return a file of a checkpoint, damaged in a way that fits its kind."""
    if name.endswith(".safetensors"):
        return mutate_header(content, chance)
    if name.endswith((".jinja", ".md", ".yaml")) and chance.random() < 0.75:
        return mutate_lines(content, LOOPS if name.endswith(".jinja") else YAML, chance)
    if name.endswith(".jsonl"):
        lines = content.splitlines()
        i = chance.randrange(len(lines))
        lines[i] = json.dumps(mutate_json(json.loads(lines[i]), chance)).encode()
        return b"\n".join(lines) if chance.random() < 0.5 else mutate_bytes(content, chance)
    if name.endswith(".json") and chance.random() < 0.75:
        return json.dumps(mutate_json(json.loads(content), chance)).encode()
    return mutate_bytes(content, chance)


def _places(data: Any) -> Any:
    for key in _keys(data):
        yield data, key
        yield from _places(data[key])


def _keys(data: Any) -> list[Any]:
    if isinstance(data, dict):
        return list(data)
    return list(range(len(data))) if isinstance(data, list) else []
