"""Methods of the literature as static pyramids: every sample takes the same experts. No torch.

They run on the engine of all pyramids, so they batch exactly, and can be exported. A preset is written as its name and
what it keeps: `pyramiddrop:0.5`, `divprune:0.25`, `fastv:K=3,R=0.5`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from dpn_cli.errors import UsageError
from dpn_cli.pyramid.config import PyramidConfig, Site
from dpn_cli.pyramid.experts import KEEP, Expert

PRESET_KEY = "preset"  # in `calibration`: what a static pyramid was made from
LEAST_SHARE = 1e-4  # what an expert's name can still say
QUARTERS = (0.25, 0.5, 0.75)  # of the depth, PyramidDrop's
_SHARE = re.compile(r"0?\.\d+")
_FASTV = re.compile(r"K=(\d+),R=(0?\.\d+)")


@dataclass(frozen=True)
class Preset:
    """A method that keeps a share of the visual tokens, the same for all samples.

    Attributes:
        kind: Kind of the expert at its sites.
        after_layers: the sites, from the decoder's depth.
        about: Description in a phrase.
        source: Paper or URL that describes it, and what is done differently here.
        first_layers: numbers K of first layers that see all tokens, to choose from, for a site after the last of them.
    """

    kind: str
    about: str
    source: str
    after_layers: Callable[[int], tuple[int, ...]] = lambda num_layers: (-1,)
    first_layers: tuple[int, ...] = ()

    def pyramid(self, share: float, num_layers: int, first_layers: int | None = None) -> PyramidConfig:
        """Return the static pyramid that keeps a share of the tokens at every site.

        Args:
            share: between 0 and 1.
            num_layers: depth of the decoder.
            first_layers: K, where it is chosen.
        """
        after = self.after_layers(num_layers) if first_layers is None else (first_layers - 1,)
        experts = (KEEP, Expert(self.kind, share=share))
        return PyramidConfig(
            sites=tuple(Site(layer, experts) for layer in after), static_route=(1,) * len(after), min_visual_tokens=1
        )


def _quarters(num_layers: int) -> tuple[int, ...]:
    return tuple(round(depth * num_layers) - 1 for depth in QUARTERS)


def _second(num_layers: int) -> tuple[int, ...]:
    return (1,)


PRESETS: dict[str, Preset] = {
    "random": Preset("random", "random tokens before the language model", "the control of UniPruneBench"),
    "stride": Preset("stride", "evenly spaced tokens before the language model", "a control"),
    "fastv": Preset(
        "attended",
        "the tokens that the last one attends to, after the first K layers",
        "https://arxiv.org/abs/2403.06764; ranked by the layer after the site, the authors take the one before it",
        after_layers=_second,
        first_layers=(2, 3, 5),
    ),
    "pyramiddrop": Preset(
        "attended",
        "the tokens that the last one attends to, the same share at every quarter of the depth",
        "https://arxiv.org/abs/2410.17247; kept tokens keep their positions, the authors number them anew",
        after_layers=_quarters,
    ),
    "visionzip": Preset(
        "visionzip",
        "the tokens that the vision tower attends to and a few means of the rest, before the language model",
        "https://arxiv.org/abs/2412.04467; merged after the projector, the authors merge before it",
    ),
    "divprune": Preset(
        "divprune",
        "the tokens that differ most from each other, before the language model",
        "https://arxiv.org/abs/2503.02175",
    ),
    "cdpruner": Preset(
        "relevant",
        "of the tokens that differ most, those that the instruction attends to, before the language model",
        "https://arxiv.org/abs/2506.10967; relevance is the first layer's attention, and the choice has two steps",
    ),
    "scope": Preset(
        "covering",
        "the tokens that all others are most similar to, before the language model",
        "https://arxiv.org/abs/2510.24214; without its salience, inside blocks of the image",
    ),
    "dart": Preset(
        "distinct",
        "the tokens least similar to a few pivots, after the second layer",
        "https://arxiv.org/abs/2502.11494; pivots by the norm of their hidden states",
        after_layers=_second,
    ),
}
"""By the names that `dpn eval --against` and `dpn export --static` take."""


def parse_preset(text: str, num_layers: int) -> PyramidConfig | None:
    """Read a preset with its settings; None where the text names none of `PRESETS`.

    Args:
        text: Preset as users write it.
        num_layers: depth of the decoder.

    Raises:
        UsageError: if the settings are not those of the preset.
    """
    name, _, settings = text.replace(" ", "").partition(":")
    if name not in PRESETS:
        return None
    preset, share, first_layers = PRESETS[name], 0.0, None
    if _SHARE.fullmatch(settings):
        share = float(settings)
    elif preset.first_layers and (match := _FASTV.fullmatch(settings)):
        share, first_layers = round(1 - float(match[2]), 6), int(match[1])
    if LEAST_SHARE <= share < 1 and (first_layers is None or 0 < first_layers < num_layers):
        pyramid = preset.pyramid(share, num_layers, first_layers)
        return replace(pyramid, calibration={PRESET_KEY: f"{name}:{settings}"})
    example = (
        f"{name}:K=3,R=0.5 (drops half after the first 3 of {num_layers} layers) or " if preset.first_layers else ""
    )
    raise UsageError(f"--static {text!r}: expected {example}{name}:0.5 (keeps half)")


def preset_of(pyramid: PyramidConfig) -> tuple[str, Preset] | None:
    """Return how the preset is written that a pyramid was made from, and the preset itself; None if it is none."""
    text = str(pyramid.calibration.get(PRESET_KEY, ""))
    preset = PRESETS.get(text.partition(":")[0])
    return None if preset is None else (text, preset)
