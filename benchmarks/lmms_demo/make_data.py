"""Write the demo's held-out pictures as a data set that lmms-eval reads offline.

    python benchmarks/lmms_demo/make_data.py --output lmms_demo_data --samples 200
    HF_HUB_OFFLINE=1 dpn eval --model dpn-demo/demo-dpn --tasks dpn_demo_pictures --include-path benchmarks/lmms_demo

`lmms-eval` itself is in the extra `harness`.
"""

from pathlib import Path

import click
from datasets import Dataset, DatasetDict

from dpn_cli.data.loading import load_data


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("lmms_demo_data"), show_default=True)
@click.option("--samples", default=200, show_default=True)
def main(output: Path, samples: int) -> None:
    """Write `image`, `question`, `answer` and `kind` of every sample."""
    held_out = load_data("demo", split="heldout", limit=samples).samples
    rows = [
        {
            "image": sample.open_images()[0],
            "question": sample.turns[0].question,
            "answer": sample.turns[0].answer,
            "kind": sample.kind,
        }
        for sample in held_out
    ]
    DatasetDict({"heldout": Dataset.from_list(rows)}).save_to_disk(output)


if __name__ == "__main__":
    main()
