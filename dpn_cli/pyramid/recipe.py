"""Recipes: what pyramid to insert and how to calibrate it. No torch."""

import json
from itertools import pairwise
from operator import itemgetter
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from dpn_cli.errors import RecipeError, UsageError
from dpn_cli.pyramid.calibration_recipe import CalibrationRecipe
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
from dpn_cli.pyramid.experts import KEEP, KINDS, Expert, Rounding, pool
from dpn_cli.pyramid.route import parse_route
from dpn_cli.pyramid.section import Section, faults

ExpertName = Annotated[str, AfterValidator(lambda name: str(Expert.parse(name)))]
Kernel = Annotated[int, Field(ge=1, le=64)]


class SiteRecipe(Section):
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


class RouterRecipe(Section):
    """The router's shape; see `RouterConfig`. By default it scores routes, and experts where there is a gate."""

    hidden_ratio: Annotated[int, Field(ge=1)] = 4
    input: RouterInput = "instruction"
    output: RouterOutput | None = None


class PyramidRecipe(Section):
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


class Recipe(Section):
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
            raise RecipeError(f"{where}: {faults(error, cls)}") from None
