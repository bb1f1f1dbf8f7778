"""What a calibration will cost, from the lengths of its samples and the sizes of its model, before anything runs."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dpn_cli.calibration.predictors import TOKENS
from dpn_cli.calibration.survey import FINAL_SAMPLES, MOST_EXPERTS, SHORTLIST, children
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
from dpn_cli.pyramid.config import PyramidConfig, Route
from dpn_cli.pyramid.experts import num_tokens
from dpn_cli.pyramid.predictors import READ_TEXT
from dpn_cli.pyramid.reach import Length
from dpn_cli.pyramid.shape import DecoderShape

EFFICIENCY = 0.5  # of a calibration's forward passes, as a share of the speed of decoder layers alone
_MEASURED_S = 0.2  # for how long each size of a decoder layer is measured
_FIRST_TOKENS = 64
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Model:
    """The sizes of a model that its calibration depends on.

    Attributes:
        shape: Shape of the decoder.
        nbytes: Size of the weights in memory.
        vision_parameters: Number of parameters of the vision tower.
        dtype: Dtype of the weights.
        device: Device that the model will run on.
    """

    shape: DecoderShape
    nbytes: int
    vision_parameters: int
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Reader:
    """A model and the samples as it reads them.

    Attributes:
        model: Sizes of the model.
        lengths: Visual grids and prompt's text tokens of every sample.
    """

    model: Model
    lengths: Sequence[Length]

    @property
    def vision(self) -> float:
        """FLOPs of the vision tower, the mean over the samples."""
        tokens = sum(num_tokens(grids) for grids, _ in self.lengths) / len(self.lengths)
        return 2 * self.model.vision_parameters * tokens

    @property
    def whole(self) -> float:
        """FLOPs of the decoder where every token is kept, the mean over the samples."""
        shape = self.model.shape
        flops = sum(shape.num_layers * shape.layer_flops(num_tokens(grids) + text) for grids, text in self.lengths)
        return flops / len(self.lengths)

    def answering(self, tokens: int) -> float:
        """Return the FLOPs of an answer of so many tokens."""
        return self.vision + self.whole * (1 + tokens / _mean_tokens(self.lengths))


@dataclass(frozen=True)
class Forecast:
    """An estimate of what a calibration costs.

    Attributes:
        forward_flops: FLOPs of all forward passes.
        flops_per_s: Speed that the passes are expected to run at.
        seconds: Time of the forward passes.
        memory_bytes: Largest memory of one process: weights and activations of a batch.
        disk_bytes: Largest size of what is kept while it runs, for a rerun after a kill.
        basis: What the figures were computed from, as sentences.
    """

    forward_flops: float
    flops_per_s: float
    seconds: float
    memory_bytes: int
    disk_bytes: int
    basis: tuple[str, ...]


def forecast(
    model: Model, pyramid: PyramidConfig, recipe: CalibrationRecipe, lengths: Sequence[Length], unanswered: int, *,
    surveys: bool, teacher: Reader | None = None, watched: int = 0,
) -> Forecast:  # fmt: skip
    """Estimate what a calibration costs.

    Args:
        model: Sizes of the model.
        pyramid: Pyramid that is calibrated; with a survey, the sites and experts to choose from.
        recipe: Settings of the calibration.
        lengths: Visual grids and prompt's text tokens of every sample.
        unanswered: Number of samples that the teacher answers.
        surveys: Whether a survey chooses the routes.
        teacher: Another model as the teacher; None for the model itself.
        watched: Number of samples that predictors learn from.
    """
    reader = Reader(model, lengths)
    shape, held = model.shape, recipe.num_held(len(lengths))
    fitted = 0 if recipe.objective == "paper" else len(lengths) - held  # the paper's routers are trained instead
    num_routes = recipe.survey.routes if surveys else _num_routes(pyramid, lengths)
    per_route = _mean_route_flops(shape, pyramid, lengths)
    tried = _tried(pyramid, recipe, fitted) if surveys else []
    measured = [(held, num_routes), (fitted, recipe.routes_per_sample(num_routes, fitted))]
    taught = 0.0 if teacher is None else teacher.vision + teacher.whole  # of a sample, whatever its number of routes
    flops = unanswered * (teacher or reader).answering(recipe.answer_tokens)
    flops += sum(samples * (taught + reader.vision + routes * per_route) for samples, routes in [*tried, *measured])
    flops += watched * (reader.vision + reader.whole)
    speed = EFFICIENCY * layer_speed(model, recipe.batch_size, round(_mean_tokens(lengths)))
    features = (held + fitted) * num_routes * len(pyramid.sites) * pyramid.router.num_inputs * shape.hidden_size * 2
    seen = watched * len(pyramid.predictor_layers) * (TOKENS + READ_TEXT) * shape.hidden_size * 2
    return Forecast(
        forward_flops=flops, flops_per_s=speed, seconds=flops / speed,
        memory_bytes=model.nbytes + (teacher.model.nbytes if teacher else 0) + _activations(model, recipe, lengths),
        disk_bytes=features + seen,
        basis=_basis(model, recipe, tried, measured, unanswered, teacher, watched),
    )  # fmt: skip


def layer_speed(model: Model, batch_size: int, tokens: int) -> float:
    """Measure the FLOPs per second of a decoder layer, with as much of a batch as takes a moment.

    Args:
        model: Sizes of the model, of which a layer with weights of zero is made.
        batch_size: Number of samples of a whole batch.
        tokens: Number of tokens of a sample.
    """
    layer = _Layer(model)
    sizes = [
        (1, min(tokens, _FIRST_TOKENS)),
        *((rows, tokens) for rows in range(1, batch_size + 1) if batch_size % rows == 0),
    ]
    speed = 0.0
    for rows, length in sizes:
        layer.run(rows, length)
        seconds, runs = 0.0, 0
        while seconds < _MEASURED_S:
            seconds, runs = seconds + layer.run(rows, length), runs + 1
        speed = runs * rows * model.shape.layer_flops(length) / seconds
        if seconds > _MEASURED_S * batch_size:
            break
    return speed


class _Layer:
    """The products and the attention of a decoder layer."""

    def __init__(self, model: Model) -> None:
        shape, self.model = model.shape, model
        query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.attention = self._zeros(query + 2 * key_value, shape.hidden_size)
        self.output = self._zeros(shape.hidden_size, query)
        self.up = self._zeros(2 * shape.intermediate_size, shape.hidden_size)
        self.down = self._zeros(shape.hidden_size, shape.intermediate_size)

    def _zeros(self, *size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=self.model.dtype, device=self.model.device)

    def run(self, rows: int, length: int) -> float:
        """Run on so many samples of a length; return the seconds."""
        shape, values = self.model.shape, self._zeros(rows, length, self.model.shape.hidden_size)
        start = time.perf_counter()
        heads = F.linear(values, self.attention).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
        query, key, value = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        values = values + F.linear(attended.transpose(1, 2).flatten(-2), self.output)
        gate, up = F.linear(values, self.up).chunk(2, dim=-1)
        values = values + F.linear(F.silu(gate) * up, self.down)
        values[0, 0, 0].item()  # waits for the device
        return time.perf_counter() - start


def _num_routes(pyramid: PyramidConfig, lengths: Sequence[Length]) -> int:
    return max(sum(1 for _ in pyramid.routes_for(grids)) for grids in {grids for grids, _ in lengths})


def _tried(pyramid: PyramidConfig, recipe: CalibrationRecipe, fitted: int) -> list[tuple[int, int]]:
    """Return on how many samples and routes every round of a survey runs, by the mean number of children of a route."""
    routes: list[Route] = children(pyramid, [pyramid.full_route])
    counts = [len(routes)]
    for _ in range(1, min(MOST_EXPERTS, len(pyramid.sites))):
        following = children(pyramid, routes)
        counts.append(round(recipe.survey.width * len(following) / max(1, len(routes))))
        routes = following
    last = min(FINAL_SAMPLES * recipe.survey.samples, fitted), SHORTLIST * recipe.survey.routes
    return [*((min(recipe.survey.samples, fitted), count) for count in counts), last]


def _mean_route_flops(shape: DecoderShape, pyramid: PyramidConfig, lengths: Sequence[Length]) -> float:
    """Return the FLOPs that a route adds for a sample, where routes share the layers before they part.

    Routes of one expert stand for all.
    """
    routes = [pyramid.full_route, *children(pyramid, [pyramid.full_route])]
    total = 0.0
    for length, count in Counter(lengths).items():
        offered = [route for route in routes if pyramid.can_walk(route, length[0])]
        total += count * tree_flops(shape, pyramid, offered, length) / len(offered)
    return total / len(lengths)


def tree_flops(shape: DecoderShape, pyramid: PyramidConfig, routes: Sequence[Route], length: Length) -> int:
    """Return the FLOPs of running a sample down some routes, which share the layers before they part."""
    grids, text = length
    segments = [len(layers) for layers in pyramid.segments(shape.num_layers)]
    nodes = {
        route[:site]: segments[site] * shape.layer_flops(text + num_tokens(stage))
        for route in routes
        for site, stage in enumerate(pyramid.walk(route, grids))
    }
    return sum(nodes.values())


def _mean_tokens(lengths: Sequence[Length]) -> float:
    return sum(num_tokens(grids) + text for grids, text in lengths) / len(lengths)


def _activations(model: Model, recipe: CalibrationRecipe, lengths: Sequence[Length]) -> int:
    """Return the bytes of a batch of the longest samples: two layers' worth of values, the MLP's and the logits."""
    shape = model.shape
    longest = max(num_tokens(grids) + text for grids, text in lengths)
    width = 6 * shape.hidden_size + 3 * shape.intermediate_size
    values = recipe.batch_size * longest * width * model.dtype.itemsize
    return values + 3 * recipe.batch_size * recipe.answer_tokens * shape.vocab_size * _FLOAT_BYTES


def _basis(
    model: Model,
    recipe: CalibrationRecipe,
    tried: Sequence[tuple[int, int]],
    measured: Sequence[tuple[int, int]],
    unanswered: int,
    teacher: Reader | None,
    watched: int,
) -> tuple[str, ...]:
    """Return in sentences what the figures were computed from, and what they leave out."""
    rounds = "; ".join(f"{some} samples on {many} routes" for some, many in tried)
    on: Counter[int] = Counter()
    for some, many in measured:
        on[many] += some
    routes = " and ".join(f"{some} samples on {many} routes" for many, some in on.items())
    stages = [f"watching the attention on {watched} samples"] * bool(watched) + [f"a survey ({rounds})"] * bool(tried)
    *before, last = [*stages, f"the measurement of {routes}"]
    work = f"{', '.join(before)} and {last}" if before else last
    by, weights = ("teacher", "the weights of both models") if teacher else ("model", "the weights")
    answers = f" {unanswered} samples are answered by the {by} first." if unanswered else ""
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"Time: the FLOPs of {work}, at {EFFICIENCY:.0%} of the speed of a decoder layer in {dtype} on {model.device}, "
        f"measured just now.{answers}",
        f"Memory: {weights} and a batch of {recipe.batch_size} of the longest samples; libraries take 1 to 2 GB more.",
        "Disk: the measurements, an upper bound; they are removed when the calibration is done.",
        *(["The training comes on top."] if recipe.objective == "paper" else []),
        *(["Training an adapter, and measuring again with it, comes on top."] if recipe.heal.method == "lora" else []),
    )
