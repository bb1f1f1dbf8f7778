"""Recipes: what pyramid to insert and how to calibrate it, as strict YAML. No torch."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpn_cli.errors import RecipeError, UsageError, did_you_mean
from dpn_cli.limits import MAX_JSON_DEPTH, MAX_SAMPLES, MAX_SEED
from dpn_cli.pyramid.config import (
    Attention,
    Gate,
    Pooling,
    Positions,
    PyramidConfig,
    Route,
    RouterConfig,
    RouterInput,
    RouterOutput,
    Site,
)
from dpn_cli.pyramid.experts import KEEP, KINDS, Expert, Rounding, known_kind, pool
from dpn_cli.pyramid.route import parse_route
from dpn_cli.pyramid.strict_yaml import parse_yaml

SAMPLES_PER_ROUTE = 1024  # to fit routers to: up to there, more tell more of a route

ExpertName = Annotated[str, AfterValidator(lambda name: str(Expert.parse(name)))]
ExpertKind = Annotated[str, AfterValidator(known_kind)]
Kernel = Annotated[int, Field(ge=1, le=64)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SiteRecipe(_Section):
    """One site, placed by depth fraction (`after`, 0 for before the first layer) or by layer (`after_layer`, or -1).

    Attributes:
        after: fraction of the depth.
        after_layer: 0-based index of the layer before it.
        experts: Names of the site's experts; by default those of the pyramid.
        rates: (rows, columns) of the cells to pool, in place of experts.
    """

    after: Annotated[float, Field(ge=0, lt=1)] | None = None
    after_layer: Annotated[int, Field(ge=-1)] | None = None
    experts: tuple[ExpertName, ...] | None = None
    rates: tuple[tuple[Kernel, Kernel], ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> "SiteRecipe":
        if (self.after is None) == (self.after_layer is None):
            raise ValueError("give either `after` (a fraction of the depth) or `after_layer` (an index)")
        if self.rates is not None and self.experts is not None:
            raise ValueError("give either `experts` or `rates` (for sites that only pool), not both")
        if self.rates is not None and self.rates[:1] != ((1, 1),):
            raise ValueError("the first rate must be [1, 1]: expert 0 keeps all")
        if self.rates is not None:
            _check_menu(pool(*self.rates), "rates")
        if self.experts is not None:
            _check_menu(_menu(self.experts), "experts")
        return self

    def menu(self, default: tuple[Expert, ...]) -> tuple[Expert, ...]:
        """Return its experts."""
        if self.rates is not None:
            return pool(*self.rates)
        return default if self.experts is None else _menu(self.experts)

    def layer(self, num_layers: int) -> int:
        """Return the 0-based decoder layer that the site follows, in a decoder of `num_layers`."""
        if self.after_layer is not None:
            return self.after_layer
        assert self.after is not None
        return round(self.after * num_layers) - 1


def _menu(names: tuple[str, ...]) -> tuple[Expert, ...]:
    """Return experts by their names, `keep` first."""
    experts = tuple(map(Expert.parse, names))
    return experts if experts[:1] == (KEEP,) else (KEEP, *experts)


def _check_menu(experts: tuple[Expert, ...], key: str) -> None:
    if len(set(experts)) < len(experts) or len(experts) < 2:
        raise ValueError(f"{key} must list at least two different entries, one of which keeps all tokens")


class RouterRecipe(_Section):
    """The router's shape; see `RouterConfig`. By default it scores routes, and experts where there is a gate."""

    hidden_ratio: Annotated[int, Field(ge=1)] = 4
    input: RouterInput = "instruction"
    output: RouterOutput | None = None


class PyramidRecipe(_Section):
    """The pyramid, independent of a model's depth; see `PyramidConfig`.

    Attributes:
        sites: Sites from the first to the last; candidates where routes are surveyed.
        experts: Names of the experts of sites that name none of their own.
        routes: Routes to offer, by the experts' names, as in `keep,diverse:0.25,exit`; null to survey them, or to offer
            all that the sites allow where routers score experts.
    """

    sites: Annotated[tuple[SiteRecipe, ...], Field(min_length=1)]
    experts: Annotated[tuple[ExpertName, ...], Field(min_length=1)] = ("keep", "pool:1x2", "pool:2x2")
    routes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    pooling: Pooling = "avg"
    gate: Gate = "none"
    positions: Positions = "persistent"
    attention: Attention = "sized"
    rounding: Rounding = "ceil"
    min_visual_tokens: Annotated[int, Field(ge=1)] = 16
    router: RouterRecipe = RouterRecipe()

    @property
    def router_config(self) -> RouterConfig:
        """The router's shape, resolved."""
        by_default = "routes" if self.gate == "none" else "distortion"
        return RouterConfig(**{**self.router.model_dump(), "output": self.router.output or by_default})


class TrainingRecipe(_Section):
    """How weights are trained, where calibration trains any.

    Attributes:
        steps: Number of optimiser steps.
        batch_size: samples per forward pass.
        gradient_accumulation: forward passes per step.
        learning_rate: the highest; it warms up, then falls to zero as a cosine.
        optimizer: `adamw`, or `adamw8bit` of bitsandbytes, with a quarter of the state.
        dtype: Dtype of the frozen weights and the activations if calibration's is `auto`. What is trained is float32.
        gradient_checkpointing: compute activations twice to keep fewer of them.
        save_every: steps between two saved states; a killed run goes on from the last one.
    """

    steps: Annotated[int, Field(ge=1)] = 400
    batch_size: Annotated[int, Field(ge=1)] = 4
    gradient_accumulation: Annotated[int, Field(ge=1)] = 4
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    dtype: Dtype = "auto"
    gradient_checkpointing: bool = False
    save_every: Annotated[int, Field(ge=1)] = 20


class HealRecipe(TrainingRecipe):
    """How the layers after the first site are healed, for the routes that fitted routers choose.

    Attributes:
        method: `none`, or `lora`: a low-rank adapter, merged into the weights at export.
        samples: Number of samples to train on, where that is more than the calibration measures; those that come in
            addition take no part in fitting the routers.
        rank: Rank of the adapter.
        alpha: the adapter's output is scaled by alpha / rank.
        target_modules: the linear layers that get an adapter.
        temperature: Softmax temperature at which teacher and student are compared.
        ce_weight: Weight of the cross-entropy to the labels, where the data has them and the route reduces tokens.
        budget_spread: Largest distance of a drawn budget from the calibration's, as a share of it.
        full_share: Share of forward passes that keep every token, so that the full model stays the teacher.
        judge_every: Number of steps between two looks at samples that are held out: the adapter that does best on them
            is kept, and none without a clear gain.
    """

    method: Literal["none", "lora"] = "none"
    samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    target_modules: Annotated[tuple[LoraTarget, ...], Field(min_length=1)] = get_args(LoraTarget)
    temperature: Annotated[float, Field(gt=0)] = 1.0
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    budget_spread: Annotated[float, Field(ge=0, le=1)] = 0.5
    full_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    judge_every: Annotated[int, Field(ge=1)] = 25


class PaperRecipe(TrainingRecipe):
    """The authors' training (`objective: paper`): routers, and the decoder through an adapter, in one go.

    Attributes:
        train: `routers` alone, or `lora`: with an adapter of `calibration.heal`'s rank, alpha and targets.
        loss: `ce` to the labels (the authors'), or `kl` to the teacher.
        routing_weight: Weight of the routing loss.
        routing_target: the mean of scale · probability of the likeliest rates, below which the routing loss pushes for
            more pooling.
    """

    train: Literal["routers", "lora"] = "lora"
    loss: Literal["ce", "kl"] = "ce"
    routing_weight: Annotated[float, Field(ge=0)] = 0.001
    routing_target: Annotated[float, Field(ge=0)] = 1.5


class SurveyRecipe(_Section):
    """How the routes are found that fit a model, where its pyramid does not list them.

    Attributes:
        samples: Largest number of samples that candidates are measured on.
        routes: Largest number of routes to choose.
        width: candidates of a round that the next round goes on with.
        experts: the kinds to try, of those that the sites have; null for all.
    """

    samples: Annotated[int, Field(ge=2, le=MAX_SAMPLES)] = 48
    routes: Annotated[int, Field(ge=2, le=64)] = 16
    width: Annotated[int, Field(ge=1)] = 10
    experts: tuple[ExpertKind, ...] | None = None


class PredictorRecipe(_Section):
    """How the predictors are fitted, where experts have any.

    Attributes:
        samples: Number of samples to learn from, where that is more than the calibration measures; those that come in
            addition take no part in fitting the routers to measurements.
        epochs: Number of passes over these samples.
    """

    samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1536
    epochs: Annotated[int, Field(ge=1)] = 12


class CalibrationRecipe(_Section):
    """How the routers are fitted.

    Attributes:
        samples: calibration samples to take from the data.
        routes: number of routes to measure per sample, or `all`, which teaches routers most for what it costs; more
            where a route would be measured on fewer than `SAMPLES_PER_ROUTE` samples. Those that are held out are
            measured on all.
        batch_size: samples per forward pass.
        holdout: fraction of the samples kept for early stopping and for the budget table.
        epochs: passes of the router fitting over the measured samples.
        learning_rate: Learning rate of router fitting; null for one that suits the model's width.
        answer_tokens: answer tokens per sample, at most.
        seed: Random seed for sampling and fitting.
        budget: the mean fraction of prefill FLOPs to reach when the command names none.
        prompts: questions for pictures that come without one.
        dtype: Dtype of the frozen weights and the activations; `auto` is the checkpoint's, or float32 on a CPU that
            only emulates the checkpoint's, if memory allows.
        load_in: hold the frozen weights in `4bit` or `8bit` (bitsandbytes) while calibrating; null for as they are.
        predictors: Settings of the predictors; null for the default ones, where a recipe's experts have any.
        survey: Settings of the survey.
        objective: `rate_distortion`, routers fitted to measured routes, or `paper`, the authors' training.
        heal: Settings of healing.
        paper: Settings of the paper's own training.
    """

    samples: Annotated[int, Field(ge=2, le=MAX_SAMPLES)] = 512
    routes: Literal["all"] | Annotated[int, Field(ge=2)] = "all"
    batch_size: Annotated[int, Field(ge=1)] = 8
    holdout: Fraction = 0.2
    epochs: Annotated[int, Field(ge=1)] = 100
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    answer_tokens: Annotated[int, Field(ge=1)] = 64
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    budget: Annotated[float, Field(gt=0, le=1)] = 0.5
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = (
        "Describe the image in one sentence.",
        "What is in this picture?",
        "Describe this image in detail.",
        "What text can be read in the image?",
    )
    dtype: Dtype = "auto"
    load_in: Literal["4bit", "8bit"] | None = None
    predictors: PredictorRecipe | None = None
    survey: SurveyRecipe = SurveyRecipe()
    objective: Literal["rate_distortion", "paper"] = "rate_distortion"
    heal: HealRecipe = HealRecipe()
    paper: PaperRecipe = PaperRecipe()

    def routes_per_sample(self, num_routes: int, samples: int) -> int:
        """Return on how many of a pyramid's routes each sample is measured that routers are fitted to."""
        if self.routes == "all" or not samples:
            return num_routes
        enough = 1 + math.ceil((num_routes - 1) * SAMPLES_PER_ROUTE / samples)  # all take the full route
        return min(num_routes, max(self.routes, enough))

    def num_held(self, measured: int) -> int:
        """Return how many of the measured samples are held out."""
        return max(1, round(self.holdout * measured))

    @property
    def training(self) -> TrainingRecipe | None:
        """Settings of what is trained beside the routers or with them; None where a calibration only measures."""
        if self.objective == "paper":
            return self.paper
        return self.heal if self.heal.method == "lora" else None

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained, as `heal` describes it."""
        return self.heal.method == "lora" or (self.objective == "paper" and self.paper.train == "lora")

    @property
    def unused_sections(self) -> set[str]:
        """The sections that say nothing about this calibration."""
        unused = {"heal": not self.trains_adapter, "paper": self.objective != "paper"}
        return {name for name, is_unused in unused.items() if is_unused}

    @property
    def samples_read(self) -> int:
        """How many samples to take from the data, those that only healing and predictors read included."""
        healed = self.heal.samples if self.heal.method == "lora" else None
        return max(self.samples, healed or 0, self.predictors.samples if self.predictors else 0)


class Recipe(_Section):
    """A pyramid and its calibration."""

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    pyramid: PyramidRecipe
    calibration: CalibrationRecipe = CalibrationRecipe()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        paper = self.calibration.objective == "paper"
        if paper and self.calibration.heal.method != "none":
            raise ValueError(
                "calibration.objective: paper trains in its own way, so nothing is healed: leave out --heal or "
                "--heal-only, or set calibration.paper.train: lora"
            )
        if paper and (self.pyramid.gate != "probability" or self.pyramid.router.output != "logits"):
            raise ValueError(
                "calibration.objective: paper trains routers through their gate: it needs pyramid.gate: probability "
                "and pyramid.router.output: logits (as in the recipe llava-1.5-7b-paper)"
            )
        return self

    @property
    def surveys(self) -> bool:
        """Whether calibration finds the routes, among all that the sites allow."""
        return self.pyramid.router_config.output == "routes" and self.pyramid.routes is None

    @property
    def predicts(self) -> bool:
        """Whether calibration fits a predictor, for an expert that the sites have and the survey may try."""
        default, tried = _menu(self.pyramid.experts), self.calibration.survey.experts or KINDS
        kinds = {expert.kind for site in self.pyramid.sites for expert in site.menu(default)}
        return any(KINDS[kind].predictor_tensors and kind in tried for kind in kinds)

    def pyramid_config(self, num_layers: int) -> PyramidConfig:
        """Place the sites in a decoder of `num_layers`.

        Raises:
            RecipeError: if two sites meet, are out of order, or fall outside of the decoder.
        """
        layers = [site.layer(num_layers) for site in self.pyramid.sites]
        if not all(-1 <= layer < num_layers - 1 for layer in layers):
            raise RecipeError(
                f"recipe {self.name}: sites after layers {layers} do not fit a decoder of {num_layers} "
                f"layers (-1, which is before the first, to {num_layers - 2} are possible)"
            )
        if any(a > b or (a == b and not self.surveys) for a, b in pairwise(layers)):
            raise RecipeError(f"recipe {self.name}: sites after layers {layers} of {num_layers} must differ and ascend")
        default = _menu(self.pyramid.experts)
        pairs = dict(zip(reversed(layers), reversed(self.pyramid.sites), strict=True))  # of candidates that meet, one
        sites = tuple(Site(layer, site.menu(default)) for layer, site in sorted(pairs.items(), key=itemgetter(0)))
        options = self.pyramid.model_dump(exclude={"sites", "experts", "routes", "router"})
        try:
            return PyramidConfig(
                sites=sites,
                routes=self._routes(sites),
                router=self.pyramid.router_config,
                **options,
            ).checked()
        except (UsageError, ValueError) as error:
            raise RecipeError(f"recipe {self.name}: {error}") from None

    def _routes(self, sites: tuple[Site, ...]) -> tuple[Route, ...] | None:
        """Return the routes that the pyramid starts with: the full one alone where they are to be surveyed."""
        if self.pyramid.router_config.output != "routes":
            return None
        full = (0,) * len(sites)
        asked = [parse_route(text, sites) for text in self.pyramid.routes or ()]
        return tuple(dict.fromkeys([full, *asked]))

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe as plain data; `Recipe.from_dict` reads it back."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> "Recipe":
        """Validate plain data.

        Raises:
            RecipeError: with every fault and its key path.
        """
        try:  # through JSON: strict about types, yet a list is a tuple and 1 is a float
            text = json.dumps(data)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{where}: only plain values are allowed ({error})") from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_faults(error)}") from None


def available_recipes() -> tuple[str, ...]:
    """Return the names of the shipped recipes."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file, resolve `extends`, and apply `key.path=value` overrides.

    Raises:
        RecipeError: if there is none, or for every fault in it at once.
    """
    path = _find(name_or_path, beside=Path())
    data = _read(path, chain=())
    for override in overrides:
        apply_override(data, override)
    return Recipe.from_dict(data, where=f"recipe {name_or_path}")


def _folder() -> Path:
    """Return the shipped recipes: inside an installed package, beside it in a source tree."""
    package = Path(__file__).parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _find(name_or_path: str, beside: Path) -> Path:
    if Path(name_or_path).suffix in {".yaml", ".yml"}:
        path = beside / name_or_path
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}")
        return path
    names = available_recipes()
    if name_or_path not in names:
        hint = did_you_mean(name_or_path, names) or f" Known: {', '.join(names)}; or a path that ends in .yaml."
        raise RecipeError(f"no recipe named {name_or_path!r}.{hint}")
    return _folder() / f"{name_or_path}.yaml"


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path in chain:
        raise RecipeError(f"recipe {path} extends itself: {' → '.join(p.name for p in (*chain, path))}")
    data = parse_yaml(path.read_bytes(), where=str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path} must be a mapping of keys to values, found {type(data).__name__}")
    if "extends" not in data:
        return data
    base = data.pop("extends")
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: extends must name one recipe, found {base!r}")
    return _merge(_read(_find(base, beside=path.parent), (*chain, path)), data)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it: mappings merge, all else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply_override(data: dict[str, Any], override: str) -> None:
    """Change one value of a recipe's plain data, in place.

    Args:
        data: Recipe as plain data.
        override: `key.path=value`; the value is YAML.

    Raises:
        RecipeError: if the override is no such pair or leads nowhere.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if len(keys) > MAX_JSON_DEPTH:
        raise RecipeError(f"--set {override:.40}… nests {len(keys)} keys; at most {MAX_JSON_DEPTH} are allowed")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override!r}: expected KEY.PATH=VALUE, as in calibration.samples=256")
    node: Any = data
    for key in keys[:-1]:
        node = node.setdefault(key, {}) if isinstance(node, dict) else _item(node, key, override)
    if isinstance(node, dict):
        node[keys[-1]] = parse_yaml(text, where=f"--set {override}")
    else:
        _item(node, keys[-1], override)
        node[int(keys[-1])] = parse_yaml(text, where=f"--set {override}")


def _item(node: Any, key: str, override: str) -> Any:
    if not isinstance(node, list) or not key.isdecimal() or int(key) >= len(node):
        raise RecipeError(f"--set {override!r}: there is no {key!r} there")
    return node[int(key)]


def _faults(error: ValidationError) -> str:
    """Return what pydantic found as one clause per key; the branches of a union are joined by `or`."""
    faults: dict[str, list[str]] = {}
    found = error.errors()
    for detail in found:
        inside = [other for other in found if other["loc"][: len(detail["loc"])] == detail["loc"]]
        if detail["type"] == "too_short" and len(inside) > 1:  # an item that has a fault is not counted
            continue
        section, path = _locate(detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            known = section.model_fields
            message = "unknown key." + (did_you_mean(str(detail["loc"][-1]), known) or f" Known: {', '.join(known)}")
        faults.setdefault(path, []).append(message)
    return "; ".join(f"{path}: {' or '.join(messages)}" for path, messages in faults.items())


def _locate(loc: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    """Return the section that a fault is in, and its key path without pydantic's names of union branches."""
    section: type[BaseModel] = Recipe
    path: list[str] = []
    in_leaf = False
    for part in loc:
        if in_leaf and isinstance(part, str):
            continue
        path.append(str(part))
        if isinstance(part, str):
            field = section.model_fields.get(part)
            nested = next(_sections_in(field.annotation), None) if field else None
            section, in_leaf = nested or section, nested is None
    return section, ".".join(path) or "the recipe"


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)
