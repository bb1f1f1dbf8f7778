"""Write posters with one question each as a LLaVA file: ``python -m tools.second_teacher.data --output DIR``."""

import json
from pathlib import Path
from random import Random
from typing import get_args

import click
from PIL import Image

from dpn_cli.data.rows import KIND_FIELD
from dpn_cli.demo.scene import Split
from tools.second_teacher.drawing import draw
from tools.second_teacher.questions import GRAINS, ask
from tools.second_teacher.scene import posters


def write_data(folder: Path, split: Split, count: int, seed: int) -> Path:
    """Write pictures and ``data.json``, the kinds of question in turn.

    Args:
        folder: A new folder.
        split: Which of the splits to draw from.
        count: Number of samples.
        seed: Names the stream.

    Returns:
        The file.
    """
    folder.mkdir(parents=True)
    endless, rng, kinds = posters(split, seed), Random(seed), tuple(GRAINS)
    rows: list[dict[str, str]] = []
    for poster in endless:
        turn = ask(kinds[len(rows) % len(kinds)], poster, rng)
        if turn is not None:
            name = f"{split}-{seed}-{len(rows)}"
            Image.fromarray(draw(poster)).save(folder / f"{name}.png")
            row = {"id": name, "image": f"{name}.png", "question": turn.question, "answer": turn.answer}
            rows.append(row | {KIND_FIELD: turn.kind})
        if len(rows) == count:
            break
    file = folder / "data.json"
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return file


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--split", type=click.Choice(get_args(Split)), default="calibration", show_default=True)
@click.option("--samples", default=600, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(output: Path, split: Split, samples: int, seed: int) -> None:
    """Write posters with one question each as a LLaVA file."""
    write_data(output, split, samples, seed)


if __name__ == "__main__":
    main()
