"""Write a teacher's model card: ``python -m tools.teacher.card CHECKPOINT --log LOG --device "H100"``.

Every figure in it is measured here, on the stored weights, or read from the log of the run that trained them.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.teacher.batches import Packer
from tools.teacher.compression import figures, table
from tools.teacher.evaluate import accuracy, exact, held_out, in_two_turns
from tools.teacher.subject import Subject
from tools.teacher.subjects import SUBJECTS

_LOG_LINES = 24


def write_card(subject: Subject, folder: Path, records: list[dict[str, object]], per_kind: int, device: str) -> None:
    """Measure the stored teacher and write ``README.md`` into its folder.

    Args:
        subject: What it was taught.
        folder: The checkpoint.
        records: The training log.
        per_kind: Questions per kind, for accuracy and for compression each.
        device: What the teacher was trained on.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    packer = Packer(subject, LlavaProcessor.from_pretrained(folder).tokenizer)
    whole = accuracy(model, packer, held_out(packer, per_kind, seed=1))
    in_two = in_two_turns(packer, 2 * per_kind) if subject.ask_on else []
    turns = torch.cat([torch.zeros(0), *(exact(model, packer, asked) for asked in in_two)]).float()
    found = figures(model, packer, held_out(packer, per_kind, seed=2))
    start, last = records[0], [record for record in records if "step" in record][-1]
    depth = len(model.model.language_model.layers)
    card = (
        (subject.card / "card.md")
        .read_text()
        .format(
            tower=model.config.vision_config.num_hidden_layers,
            layers=depth,
            tokens=model.config.image_seq_length,
            parameters=model.num_parameters(),
            megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
            arguments=start["arguments"],
            seconds=last["seconds"],
            steps=last["step"],
            batch=start["batch"],
            device=device,
            seed=start["seed"],
            versions=start["versions"],
            measured=f"torch {torch.__version__}, transformers {transformers.__version__}",
            count=per_kind,
            two_turns_count=len(turns),
            two_turns=100 * turns.mean().item(),
            accuracy=table(subject, {"accuracy": whole}),
            count_compression=per_kind,
            quarter=depth // 4,
            half=depth // 2,
            three_quarters=depth * 3 // 4,
            compression=table(subject, found),
            summary=summary(subject, found),
            story=(subject.card / "story.md").read_text().strip(),
            log="\n".join(json.dumps(record) for record in _thinned(records)),
        )
    )
    (folder / "README.md").write_text(card)


def summary(subject: Subject, found: dict[str, dict[str, float]]) -> str:
    """Say in a few lines what the figures mean for each demand on a teacher that is hard to compress."""
    whole = found["whole"]
    lines = []
    for name in ("none after a quarter", "none after half", "pooled 2×2", "pooled 4×4"):
        losses = {kind: 100 * (whole[kind] - found[name][kind]) for kind in subject.kinds}
        most = max(losses, key=lambda kind: losses[kind])
        many = sum(loss >= 20 for loss in losses.values())
        lines.append(
            f"- {name}: costs most on {most}, {losses[most]:.0f} points, and at least 20 points on {many} kinds."
        )
    for name, misses in found.items():
        if name.startswith("overlooked"):
            fine = [misses[kind] for kind, grain in subject.grains.items() if grain == "fine"]
            lines.append(f"- {name}: {100 * sum(fine) / len(fine):.0f}% of the fine questions.")
    return "\n".join(lines)


def _thinned(records: list[dict[str, object]]) -> list[dict[str, object]]:
    return [*records[: -1 : max(1, len(records) // _LOG_LINES)], records[-1]]


def main() -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description="Write the model card of a trained teacher.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--log", type=Path, required=True, help="the training log, log.jsonl")
    parser.add_argument("--device", required=True, help="what it was trained on")
    parser.add_argument("--teacher", choices=SUBJECTS, default="demo")
    parser.add_argument("--per-kind", type=int, default=100)
    args = parser.parse_args()
    records = [json.loads(line) for line in args.log.read_text().splitlines()]
    write_card(SUBJECTS[args.teacher], args.checkpoint, records, args.per_kind, args.device)


if __name__ == "__main__":
    main()
