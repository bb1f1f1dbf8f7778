"""What tests of exports share: the bytes of a folder, and a question to its model."""

from pathlib import Path
from typing import Any

from dpn_cli.checkpoint.headers import Checkpoint

QUESTION = "what colour is the small circle ?"


def stored(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor, by name."""
    checkpoint = Checkpoint.open(folder)
    raw = {file: (folder / file).read_bytes() for file in checkpoint.files}
    return {n: raw[t.file][t.start : t.start + t.nbytes] for n, t in checkpoint.tensors.items()}


def answer(model: Any, folder: Path, picture: Path) -> tuple[str, list[list[int]]]:
    """Return the greedy answer and its routes."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    inputs = question(folder, picture)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens[0]), [list(route) for route in model.last_routes]


def question(folder: Path, picture: Path) -> Any:
    """Return the inputs of a question about a picture."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=prompt, images=[Image.open(picture)], return_tensors="pt")
