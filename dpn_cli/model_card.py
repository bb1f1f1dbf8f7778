"""The model card (README.md) of an exported checkpoint. No torch."""

from typing import Any

from dpn_cli import __version__
from dpn_cli.checkpoint.layout import LlavaLayout
from dpn_cli.modeling.pyramid_config import PyramidConfig

BUDGETS_SHOWN = 10


def model_card(name: str, config: dict[str, Any], layout: LlavaLayout, pyramid: PyramidConfig) -> str:
    """Return the card's text.

    Args:
        name: of the exported folder.
        config: its config.json.
        layout: of its decoder.
        pyramid: as exported.
    """
    base = str(config.get("base_model", "a LLaVA"))
    parts = [_front_matter(base), f"# {name}", _summary(base, layout), _pyramid(pyramid), _calibration(pyramid)]
    return "\n\n".join([*parts, _usage(name, pyramid)]) + "\n"


def _front_matter(base: str) -> str:
    repo_id = base.split("@", maxsplit=1)[0]
    lines = ["library_name: transformers", "pipeline_tag: image-text-to-text", "tags: [llava, dpn]"]
    if "/" in repo_id:
        lines.append(f"base_model: {repo_id}")
    return "\n".join(["---", *lines, "---"])


def _summary(base: str, layout: LlavaLayout) -> str:
    height, width = layout.grid
    return (
        f"`{base}`, its language model made a dynamic pyramid: the {height}×{width} = {height * width} visual tokens "
        f"of an image are pooled at a few depths of the {layout.shape.num_layers} decoder layers, at rates that small "
        "routers pick for every question. Text tokens are untouched. "
        f"Written by `dpn export` (dpn-cli {__version__}). The licence is the base model's; the code's is Apache-2.0."
    )


def _pyramid(pyramid: PyramidConfig) -> str:
    rows = [
        [f"after decoder layer {site.after_layer}", ", ".join(f"{height}×{width}" for height, width in site.rates)]
        for site in pyramid.sites
    ]
    routing = "the routers" if pyramid.static_route is None else f"fixed: experts {list(pyramid.static_route)}"
    notes = f"Pooling: {pyramid.pooling}. Route: {routing}, λ = {pyramid.trade_off:.4g}."
    return "\n\n".join(["## The pyramid", _table(["site", "rates (tokens merged into one)"], rows), notes])


def _calibration(pyramid: PyramidConfig) -> str:
    title = "## Calibration"
    if not pyramid.budgets:
        return f"{title}\n\nNot calibrated: the model answers exactly as its base does, and pools nothing by itself."
    step = -(-len(pyramid.budgets) // BUDGETS_SHOWN)
    rows = [
        [f"{row.fraction:.3f}", f"{row.trade_off:.4g}", f"{row.distortion:.4f}"]
        for row in [*pyramid.budgets[:-1:step], pyramid.budgets[-1]]
    ]
    parts = [
        title,
        "Measured on held-out calibration samples against the model with its pyramid off. The budget is the mean "
        "fraction of the original language model's prefill FLOPs.",
        _table(["budget", "λ", "KL divergence, nats"], rows),
    ]
    facts = [[key.replace("_", " "), _value(value)] for key, value in pyramid.calibration.items()]
    return "\n\n".join([*parts, *([_table(["calibrated with", ""], facts)] if facts else [])])


def _usage(name: str, pyramid: PyramidConfig) -> str:
    budget = f"{pyramid.budgets[len(pyramid.budgets) // 2].fraction:.2f}" if pyramid.budgets else None
    choose = f"model.set_budget({budget})  # any budget, no retraining\n" if budget else ""
    return f"""\
## Use

With dpn-cli installed:

```python
import dpn_cli
from transformers import AutoProcessor

model = dpn_cli.load("{name}")
processor = AutoProcessor.from_pretrained("{name}")
{choose}```

Without it, the code comes along with the checkpoint (`modeling_dpn_llava.py`):

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}")
```

`model.last_routes` says which rates the last prompt took; `with model.teacher():` switches the pyramid off."""


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_value, value)) if isinstance(value, list) else str(value)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *([text.replace("|", r"\|") for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
