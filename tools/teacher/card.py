"""The teacher's model card: every figure in it is measured or read from the log here."""

from collections.abc import Sequence
from pathlib import Path

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dpn_cli.demo.pictures import GRAINS, KINDS, samples
from dpn_cli.pyramid.experts import Rate
from tools.teacher.evaluate import SITES, accuracy

PER_KIND = 100
ROUTES: tuple[tuple[Rate, Rate, Rate], ...] = (
    ((1, 1), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (2, 2)),
    ((1, 1), (2, 2), (1, 1)),
    ((1, 2), (1, 1), (1, 1)),
    ((1, 2), (2, 2), (1, 1)),
    ((2, 2), (1, 1), (1, 1)),
    ((2, 2), (1, 2), (1, 1)),
)
_LOG_LINES = 40

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---
# The dpn demo teacher

A small LLaVA (CLIP vision tower, projector, Llama decoder of {layers} layers, {tokens} visual tokens) that
answers one-word questions about generated pictures. `python -m tools.teacher.train --output DIR` trained it
from nothing on pictures of `dpn_cli.demo.pictures` and wrote this card. It stands in for a real LLaVA where a
download would be too much: in `dpn demo` and in the tests. It can do nothing else.

- Parameters: {parameters:,}; weights {megabytes:.1f} MB in bfloat16.
- Training: {seconds:.0f} s on the CPU, {steps}.
- Held-out accuracy: greedy decoding of the stored weights, exact match, {count} samples per kind, pictures
  that share no content with training or calibration.

| kind | grain | accuracy |
|---|---|---|
{accuracy}

## What pooling costs

The same accuracy when the visual tokens are average-pooled (rows×columns) after layers
{sites}, nothing retrained, on the same samples:

| route | {kinds} |
|---|{dashes}
{pooled}

## Training log, thinned

```json
{log}
```
"""


def write_card(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    records: Sequence[dict[str, object]],
    folder: Path,
) -> None:
    """Measure the stored teacher and write ``README.md`` into its folder.

    Args:
        model: The teacher as stored.
        processor: Its processor.
        records: The training log.
        folder: The checkpoint folder.
    """
    held_out = list(samples("heldout", PER_KIND * len(KINDS), seed=1))
    whole = accuracy(model, processor, held_out)
    pooled = {route: accuracy(model, processor, held_out, route) for route in ROUTES}
    last = {str(record["stage"]): record["step"] for record in records}
    thinned = [*records[:: max(1, len(records) // _LOG_LINES)], records[-1]]
    card = _CARD.format(
        layers=model.config.text_config.num_hidden_layers,
        tokens=model.config.image_seq_length,
        parameters=model.num_parameters(),
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        seconds=records[-1]["seconds"],
        steps=" and ".join(f"{step} {stage} steps" for stage, step in last.items()),
        count=PER_KIND,
        accuracy="\n".join(f"| {kind} | {GRAINS[kind]} | {whole[kind]:.3f} |" for kind in KINDS),
        sites=", ".join(map(str, SITES)),
        kinds=" | ".join(KINDS),
        dashes="---|" * len(KINDS),
        pooled="\n".join(_row(route, pooled[route]) for route in ROUTES),
        log="\n".join(str(record).replace("'", '"') for record in thinned),
    )
    (folder / "README.md").write_text(card)


def _row(route: tuple[Rate, Rate, Rate], found: dict[str, float]) -> str:
    name = ", ".join(f"{rows}×{columns}" for rows, columns in route)
    return f"| {name} | " + " | ".join(f"{found[kind]:.3f}" for kind in KINDS) + " |"
