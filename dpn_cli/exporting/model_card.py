"""The model card (README.md) of an exported checkpoint. No torch."""

from collections.abc import Iterator
from typing import Any

import yaml

from dpn_cli import __version__
from dpn_cli.checkpoint.layout import IMAGE_SIZE, TEXT_TOKENS, LlavaLayout
from dpn_cli.checkpoint.licence import KEYS
from dpn_cli.families.family import Family
from dpn_cli.pyramid.config import PyramidConfig
from dpn_cli.pyramid.cost import flops_fraction
from dpn_cli.pyramid.presets import preset_of
from dpn_cli.pyramid.route import format_route

BUDGETS_SHOWN = 10
TRANSFORMERS = "5.15.1 to 5.24.0"  # the releases that exports are tested with


def model_card(name: str, config: dict[str, Any], layout: LlavaLayout, pyramid: PyramidConfig) -> str:
    """Return the card's text.

    Args:
        name: name of the exported folder.
        config: the export's config.json.
        layout: the decoder's layout.
        pyramid: the exported pyramid.
    """
    parts = [_front_matter(config), f"# {name}", _summary(config, layout, pyramid), _pyramid(pyramid, layout)]
    if pyramid.static_route is None:
        parts.append(_calibration(pyramid))
    return "\n\n".join([*parts, _usage(name, config, pyramid)]) + "\n"


def _front_matter(config: dict[str, Any]) -> str:
    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "dpn"],
    } | {key: config[key] for key in KEYS if key in config}
    repo_id = _base(config).split("@", maxsplit=1)[0]
    if "/" in repo_id:
        data["base_model"] = repo_id
        if "quantization_config" in config:
            data["base_model_relation"] = "quantized"
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"


def _base(config: dict[str, Any]) -> str:
    return str(config.get("base_model", "a LLaVA"))


def _summary(config: dict[str, Any], layout: LlavaLayout, pyramid: PyramidConfig) -> str:
    height, width = layout.grid
    tiles = "" if layout.tiling is None else " as a whole, and those of its tiles,"
    rates = "small routers pick for every question" if pyramid.static_route is None else "are the same for every image"
    licence = f" ({config['license']})" if "license" in config else ""
    return (
        f"`{_base(config)}` with its language model made a pyramid: the {height}×{width} = {height * width} visual "
        f"tokens of an image{tiles} are reduced at a few depths of the {layout.shape.num_layers} decoder layers, by "
        f"experts that {rates}. Text tokens are untouched. Written by `dpn export` (dpn-cli {__version__}). The "
        f"licence is the base model's{licence}; the code's is Apache-2.0."
    )


def _pyramid(pyramid: PyramidConfig, layout: LlavaLayout) -> str:
    rows = [[str(site), ", ".join(map(str, site.experts))] for site in pyramid.sites]
    parts = ["## The pyramid", _table(["site", "experts"], rows)]
    if found := preset_of(pyramid):
        text, preset = found
        parts.append(f"Method: `{text}`, {preset.about}. Source: {preset.source}.")
    parts.append(f"Pooling: {pyramid.pooling}. Route: {_route(pyramid, layout)}.")
    return "\n\n".join(parts)


def _route(pyramid: PyramidConfig, layout: LlavaLayout) -> str:
    if pyramid.static_route is None:
        budget = "" if pyramid.budget is None else f", which is a budget of {pyramid.budget:.3g}"
        return f"the routers', λ = {pyramid.trade_off:.4g}{budget}"
    experts = format_route(pyramid.static_route, pyramid.sites)
    size = "" if layout.tiling is None else " of {}×{} pixels".format(*IMAGE_SIZE)
    share = flops_fraction(layout.shape, pyramid, pyramid.static_route, layout.image_grids([IMAGE_SIZE]), TEXT_TOKENS)
    return (
        f"fixed, {experts}, which takes {share:.3f} of the original's prefill FLOPs for one image{size} and "
        f"{TEXT_TOKENS} text tokens"
    )


def _calibration(pyramid: PyramidConfig) -> str:
    title = "## Calibration"
    if pyramid.is_imported:
        return f"{title}\n\nNone: the pyramid came with the base model, and its routers choose as they were trained to."
    if not pyramid.budgets:
        return f"{title}\n\nNot calibrated: the model answers exactly as its base does, and keeps all visual tokens."
    step = -(-len(pyramid.budgets) // BUDGETS_SHOWN)
    rows = [
        [f"{row.fraction:.3f}", f"{row.trade_off:.4g}", f"{row.distortion:.4f}"]
        for row in [*pyramid.budgets[:-1:step], pyramid.budgets[-1]]
    ]
    solved = "budgets_solved_on" in pyramid.calibration
    samples = "the samples on which λ was solved" if solved else "held-out calibration samples"
    teacher = pyramid.calibration.get("budgets_solved_on", pyramid.calibration).get("teacher")
    reference = f"the teacher `{teacher}`" if teacher else "the model with its pyramid off"
    parts = [
        title,
        f"Measured on {samples} against {reference}. The budget is the mean fraction of the original language model's "
        "prefill FLOPs.",
        _table(["budget", "λ", "KL divergence, nats"], rows),
    ]
    facts = [[name, _value(value)] for name, value in _flat(pyramid.calibration)]
    return "\n\n".join([*parts, *([_table(["calibrated with", ""], facts)] if facts else [])])


def _usage(name: str, config: dict[str, Any], pyramid: PyramidConfig) -> str:
    budget = f"{pyramid.budgets[len(pyramid.budgets) // 2].fraction:.2f}" if pyramid.budgets else None
    choose = f"model.set_budget({budget})  # any budget, no retraining\n" if budget else ""
    return f"""\
## Use
{_quantised(config)}
With dpn-cli installed:

```python
import dpn_cli
from transformers import AutoProcessor

model = dpn_cli.load("{name}")
processor = AutoProcessor.from_pretrained("{name}")
{choose}```

Without it, the code comes along with the checkpoint (`modeling_dpn_llava.py`, tested with transformers
{TRANSFORMERS}):

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
```
{_videos(config)}
`model.last_routes` says which routes the last prompts took; `with model.teacher():` switches the pyramid off."""


def _videos(config: dict[str, Any]) -> str:
    """Say what a processor with a part for videos needs, as a paragraph; nothing for another."""
    if Family.of(config).video_processor is None:
        return ""
    return "\n`AutoProcessor` needs torchvision here, even for images alone: `pip install torchvision`.\n"


def _quantised(config: dict[str, Any]) -> str:
    """Say what a quantised checkpoint needs, as a paragraph; nothing for another."""
    found = config.get("quantization_config")
    if found is None:
        return ""
    kind = f"4 bits ({found['bnb_4bit_quant_type']})" if found["load_in_4bit"] else "8 bits"
    return (
        f"\nThe decoder's linear layers are stored in {kind}: `pip install bitsandbytes accelerate`. Loading "
        "needs no further options. Everything else (vision tower, projector, embeddings, `lm_head`) is not quantised.\n"
    )


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield facts, those inside of others with both names; what is None is left out."""
    for key, value in facts.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{name}: ")
        elif value is not None:
            yield name, value


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_value, value)) if isinstance(value, list) else str(value)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *([text.replace("|", r"\|") for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
