"""The samples that calibration and evaluation read, whatever they came from. No torch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from dpn_cli.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_FAULTS_SHOWN = 5
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """A question and, where the data has one, its answer."""

    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Sample:
    """One conversation about its images, which are all shown before the first question.

    Attributes:
        id: names the sample in reports.
        images: files, or pictures in memory.
        turns: at least one.
        kind: the group that figures are reported by, where the data has groups.
    """

    id: str
    images: tuple[Path | Image.Image, ...]
    turns: tuple[Turn, ...]
    kind: str | None = None

    def open_images(self) -> list[Image.Image]:
        """Return the images in RGB.

        Raises:
            DataError: if a file is no image that can be read.
        """
        return [_open(image) for image in self.images]

    def answered(self, answer: str) -> "Sample":
        """Return the sample with its first turn alone, answered so."""
        return replace(self, turns=(Turn(self.turns[0].question, answer),))


def load_data(
    data: str, image_root: Path | None = None, prompts: Sequence[str] = (), split: str = "calibration"
) -> Iterator[Sample]:
    """Read samples that have an image.

    Args:
        data: `demo`; a LLaVA .json or .jsonl file; or a folder of images.
        image_root: where a LLaVA file's image paths start; by default its own folder.
        prompts: the questions for a folder of images, in turn.
        split: of the demo data.

    Raises:
        DataError: if there are none, or naming the faulty rows.
    """
    if data == "demo":
        return _demo_samples(split)
    path = Path(data).expanduser()
    if path.is_dir():
        return iter(_image_folder(path, prompts))
    if path.suffix in {".json", ".jsonl"} and path.is_file():
        return iter(_llava_file(path, image_root or path.parent))
    what = f"is a {path.suffix or 'file without a suffix'}" if path.exists() else "does not exist"
    raise DataError(f"--data {data} {what}: expected a LLaVA .json or .jsonl file, a folder of images, or demo")


def _demo_samples(split: str) -> Iterator[Sample]:
    """Yield the demo's samples without end, all of one stream."""
    from dpn_cli.demo.pictures import samples

    for sample in samples(split, count=1_000_000):  # type: ignore[arg-type]
        yield Sample(sample.id, (sample.image,), (Turn(sample.question, sample.answer),), sample.kind)


def _image_folder(folder: Path, prompts: Sequence[str]) -> list[Sample]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [
        Sample(str(path.relative_to(folder)), (path,), (Turn(prompts[i % len(prompts)]),))
        for i, path in enumerate(files)
    ]


def _llava_file(path: Path, image_root: Path) -> list[Sample]:
    samples, faults = [], []
    for number, row in _rows(path):
        try:
            sample = _llava_row(row, number, image_root)
        except ValueError as error:
            faults.append(f"row {number}: {error}")
        else:
            samples.extend([sample] if sample.images else [])
    if faults:
        more = f" (and {len(faults) - MAX_FAULTS_SHOWN} more)" if len(faults) > MAX_FAULTS_SHOWN else ""
        raise DataError(f"{path} has {len(faults)} bad rows: {'; '.join(faults[:MAX_FAULTS_SHOWN])}{more}")
    if not samples:
        raise DataError(f"{path} has no row with an image: routers are calibrated on images")
    return samples


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, row) of a JSON list or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise DataError(f"{path} holds a JSON {type(rows).__name__}, expected a list of conversations")
            yield from enumerate(rows, 1)
            return
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, json.loads(line)
    except ValueError as error:
        raise DataError(f"{path} is not {path.suffix[1:].upper()}: {error}") from None


def _llava_row(row: Any, number: int, image_root: Path) -> Sample:
    """Read {id, image | images, conversations: [{from, value}] | messages: [{role, content}]}."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    files = row.get("images") or ([row["image"]] if row.get("image") else [])
    images = tuple(image_root / file for file in files)
    if missing := [str(image) for image in images if not image.is_file()]:
        raise ValueError(f"no image file {missing[0]}")
    messages = row.get("conversations") or row.get("messages")
    if not isinstance(messages, list):
        raise ValueError("no list under `conversations` or `messages`")
    questions: list[str] = []
    turns: list[Turn] = []
    for message in messages:
        role = _ROLES.get(message.get("from") or message.get("role"))
        text = message.get("value") if "value" in message else message.get("content")
        if role is None or not isinstance(text, str):
            raise ValueError("a message needs from human or gpt and a text value")
        if role == "user":
            questions.append(text.replace("<image>", "").strip())
        elif questions:
            turns.append(Turn(questions.pop(), text.strip()))
        else:
            raise ValueError("an answer comes before its question")
    turns += [Turn(question) for question in questions]
    if not turns:
        raise ValueError("no question")
    return Sample(str(row.get("id", number)), images, tuple(turns), row.get("kind"))


def _open(image: Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{image} is no image that can be read ({error})") from None
