"""What a pyramid is, without torch: sites, experts, routes, and what a route does to a sample's visual grids.

A *site* sits after a decoder layer, or before the first one, and has *experts*; a *route* is one expert (its index)
per site; a sample's visual tokens are one or several *grids* (H, W). A pyramid offers a set of routes, or all that its
sites allow. All of it is plain data, stored as `pyramid` in config.json.

Some families end every row of a mosaic of tiles with a newline token. The newlines of H rows are a grid (H, 1) of
their own, after the mosaic's: when rows merge, so do their newlines, and each stands after its merged row. A column
is never narrowed, and no rate is withheld for its sake.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise, product
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from dpn_cli.pyramid.budgets import Budget, fraction_at, trade_off_at, trust_at
from dpn_cli.pyramid.experts import (
    KEEP,
    KINDS,
    Expert,
    Grid,
    Rounding,
    num_tokens,
    pictures_of,
)
from dpn_cli.pyramid.shape import Shapes

Block = tuple[Grid, ...]  # grids of equally many rows, whose tokens come row by row: of each the first, the second, …
Route = tuple[int, ...]  # one expert index per site

PYRAMID_VERSION = 2
FITTED_PARTS = ("routers", "predictors")  # of a text model: what calibration fits, always in float32
DPE_PARTS = tuple(f"{part}." for part in (*FITTED_PARTS, "poolers"))  # what a pyramid adds to a text model

# What a router may read, by the vectors of hidden_size that it is made of: see `ROUTER_VECTORS` in modeling/routers.py.
ROUTER_INPUTS = {
    "last_instruction_token": ("read",),  # paper, section 3.3
    "instruction": ("read", "text_mean"),  # ours
    "with_summaries": ("read", "text_mean", "visual_mean", "visual_max"),  # ours
}

if TYPE_CHECKING:
    RouterInput = str
else:
    RouterInput = Literal[tuple(ROUTER_INPUTS)]
RouterOutput = Literal["routes", "distortion", "logits"]
Pooling = Literal["avg", "max", "conv"]
Gate = Literal["none", "probability"]
Positions = Literal["persistent", "contiguous"]
Attention = Literal["plain", "sized"]

IMPORTED_KEY = "imported"  # in `calibration`
ADAPTER_KEY = "adapter"  # likewise: the adapter's folder inside the checkpoint's, where that is healed
IMPORTED_USE = (
    "use it without a budget, as it was trained, or fix a route (`dpn run --route`, `dpn export --static`, "
    "model.set_route)"
)


@dataclass(frozen=True)
class Site:
    """One place where visual tokens are reduced.

    Attributes:
        after_layer: the decoder layer (0-based) before it; -1 is before the first layer.
        experts: Experts of the site; the first one keeps all visual tokens.
    """

    after_layer: int
    experts: tuple[Expert, ...]

    def __str__(self) -> str:
        """Return where it is."""
        return "before the first layer" if self.after_layer < 0 else f"after layer {self.after_layer}"


@dataclass(frozen=True)
class Option:
    """What one of a router's scores at a site stands for.

    Attributes:
        expert: Expert that is taken if this option is the best.
        score: Index of the option among the router's outputs.
        route: whose FLOPs it costs.
    """

    expert: int
    score: int
    route: Route


@dataclass(frozen=True)
class RouterConfig:
    """The router's shape.

    Attributes:
        kind: `mlp` (paper, section 3.3), or `linear`, one layer without a norm (the authors' second version).
        hidden_ratio: the hidden width of an mlp is hidden_size // hidden_ratio.
        input: one of `ROUTER_INPUTS`: `last_instruction_token`; `instruction`, beside it the mean of the prompt's text
            tokens; or `with_summaries`, beside these the mean and the maximum of its visual tokens.
        token_id: read this token of the prompt, the mean where there are several, in place of the last instruction
            token (the authors' `<ROUTER>`).
        output: `routes`, one score per route of the pyramid, logit_r = -softplus(z_r) and 0 for the full route (ours);
            `distortion`, the same per expert of the site; or `logits`, one z_k per expert (paper).
    """

    kind: Literal["mlp", "linear"] = "mlp"
    hidden_ratio: int = 4
    input: RouterInput = "with_summaries"
    token_id: int | None = None
    output: RouterOutput = "distortion"

    @property
    def num_inputs(self) -> int:
        """Vectors of hidden_size that the router reads."""
        return len(ROUTER_INPUTS[self.input])

    def tensors(self, hidden_size: int, num_outputs: int) -> Shapes:
        """Return the shapes of a router's tensors, by name."""
        inputs = width = hidden_size * self.num_inputs
        shapes: Shapes = {}
        if self.kind == "mlp":
            width = hidden_size // self.hidden_ratio
            shapes = {"norm.weight": (inputs,), "norm.bias": (inputs,)}
            shapes |= {"hidden.weight": (width, inputs), "hidden.bias": (width,)}
        return shapes | {"head.weight": (num_outputs, width), "head.bias": (num_outputs,)}


@dataclass(frozen=True)
class PyramidConfig:
    """Everything that turns a decoder into a pyramid.

    Attributes:
        sites: Sites, in the order of their layers.
        routes: Routes that are offered, the full one first; None for all that the sites allow.
        mean_losses: Mean loss of each route, as calibration measured it; empty before that.
        pooling: `avg`, `max`, or `conv` (depthwise, initialised as avg).
        gate: `none`, or `probability`: pooled tokens are scaled by the chosen softmax(logits / 10) (paper, eq. 4).
        positions: `persistent` (a merged token takes the mean position of its cell; text keeps its own), or
            `contiguous` (re-indexed in every segment, as the paper's authors do).
        attention: `plain`, or `sized`: a token that others were merged into counts as many as it stands for, log(size)
            on its attention logits (RESTORE; ToMe, https://arxiv.org/abs/2210.09461, equation 1).
        rounding: `ceil` keeps the incomplete cells at a grid's edge, `floor` drops them.
        prepooling: side of the squares in which the vision tower's features are averaged, before the projector.
        min_visual_tokens: an expert that would leave a grid (a selection: a sample) with fewer tokens is not offered;
            but `exit` is.
        min_input_tokens: a sample with fewer visual tokens is neither pooled nor gated.
        trade_off: λ of the decision rule argmax_k(logit_k - λ·cost_k); stored under the key `lambda`.
        static_route: one expert index per site for every sample, or None to ask the routers; stored under the key
            `gated_route` where the routers stay for their gate.
        answer_cue: token ids that the chat template writes between a question and its answer; in labelled
            conversations they show where an instruction ends. Empty if it is not known.
        budgets: measured by calibration, by falling fraction; empty before it.
        calibration: what calibration was run with, for the record; or that it was imported.
    """

    sites: tuple[Site, ...]
    routes: tuple[Route, ...] | None = None
    mean_losses: tuple[float, ...] = ()
    pooling: Pooling = "avg"
    gate: Gate = "none"
    positions: Positions = "persistent"
    attention: Attention = "plain"
    rounding: Rounding = "ceil"
    router: RouterConfig = field(default_factory=RouterConfig)
    prepooling: int = 1
    min_visual_tokens: int = 16
    min_input_tokens: int = 1
    trade_off: float = 0.0
    static_route: Route | None = None
    answer_cue: tuple[int, ...] = ()
    budgets: tuple[Budget, ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PyramidConfig":
        """Read the `pyramid` section of a config.json.

        Raises:
            ValueError: for another version, unknown keys, impossible values, or a site whose first expert does not
                keep all.
        """
        data = dict(data)
        version = data.pop("version", None)
        if version not in (1, PYRAMID_VERSION):
            raise ValueError(f"pyramid config has version {version!r}, this dpn reads versions 1 and {PYRAMID_VERSION}")
        known = {"lambda", "mean_distortions", "gated_route", *cls.__dataclass_fields__} - {"trade_off", "mean_losses"}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"pyramid config has unknown keys: {', '.join(unknown)}")
        sites = tuple(
            Site(int(site["after_layer"]), tuple(Expert.parse(f"{h}x{w}") for h, w in site["rates"]))
            if version == 1
            else Site(int(site["after_layer"]), tuple(map(Expert.parse, site["experts"])))
            for site in data.pop("sites")
        )
        routes = data.pop("routes", None)
        ungated, gated = data.pop("static_route", None), data.pop("gated_route", None)
        route = gated if ungated is None else ungated
        if ungated is not None:  # once stored for pyramids with a gate too, whose routers and gate were left out
            data["gate"] = "none"
        config = cls(
            sites=sites,
            routes=None if routes is None else tuple(tuple(map(int, each)) for each in routes),
            mean_losses=tuple(map(float, data.pop("mean_distortions", ()))),
            router=RouterConfig(**data.pop("router", {})),
            trade_off=data.pop("lambda", 0.0),
            static_route=None if route is None else tuple(map(int, route)),
            answer_cue=tuple(map(int, data.pop("answer_cue", ()))),
            budgets=tuple(Budget(*row) for row in data.pop("budgets", [])),
            **data,
        )
        return config.checked()

    def checked(self) -> "PyramidConfig":
        """Return it, if it can be.

        Raises:
            ValueError: for what a pyramid cannot be.
        """
        for part in (self, self.router, *self.budgets):
            _check_fields(part)
        for site in self.sites:
            self._check_site(site)
        for route in (*(self.routes or ()), *self.own_routes):
            fits = len(route) == len(self.sites)
            if not fits or not all(0 <= k < len(s.experts) for k, s in zip(route, self.sites, strict=True)):
                name = "static route" if route in self.own_routes else "route"
                raise ValueError(f"the {name} {list(route)} does not fit the pyramid's sites")
        if self.routes is not None and (
            self.routes[:1] != (self.full_route,) or len(set(self.routes)) < self.num_routes
        ):
            raise ValueError("the first route of a pyramid must be the full one, and all must differ")
        if self.mean_losses and len(self.mean_losses) != self.num_routes:
            raise ValueError("a pyramid needs a mean loss for each of its routes, or none (mean_distortions)")
        if (self.router.output == "routes") != (self.routes is not None):
            raise ValueError("a pyramid lists its routes if, and only if, its routers score routes")
        if self.router.output == "routes" and self.gate != "none":
            raise ValueError("a gate needs routers that score experts (router.output: logits or distortion)")
        return self

    def _check_site(self, site: Site) -> None:
        if site.experts[:1] != (KEEP,):
            raise ValueError("the first expert of every pyramid site must be keep")
        if site.after_layer < -1:
            raise ValueError(f"a pyramid site cannot be after layer {site.after_layer}")
        for expert in site.experts:
            if self.pooling == "conv" and expert.kind not in ("keep", "pool"):
                raise ValueError(f"{expert} has no kernel: with conv pooling all experts must pool")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; the inverse of `from_dict`."""
        data = asdict(self)
        data["lambda"] = data.pop("trade_off")
        data["sites"] = [{"after_layer": s.after_layer, "experts": list(map(str, s.experts))} for s in self.sites]
        data["routes"] = None if self.routes is None else [list(route) for route in self.routes]
        data["mean_distortions"] = list(data.pop("mean_losses"))
        data["static_route"] = None if self.static_route is None else list(self.static_route)
        if self.static_route is not None and self.has_routers:
            data["gated_route"] = data.pop("static_route")
        data["answer_cue"] = list(self.answer_cue)
        data["budgets"] = [[b.fraction, b.trade_off, b.distortion, b.trust] for b in self.budgets]
        return {"version": PYRAMID_VERSION, **data}

    @property
    def has_routers(self) -> bool:
        """Whether there are routers: to choose experts, or for the gate of those that are fixed."""
        return self.static_route is None or self.gate != "none"

    @property
    def is_imported(self) -> bool:
        """Whether it came with the source: its routers were trained with the model, and have no budgets."""
        return bool(self.calibration.get(IMPORTED_KEY))

    @property
    def calibrated_on(self) -> str:
        """The data and the budget of its calibration, for a reader; empty if it is not calibrated."""
        if not self.budgets:
            return ""
        data, budget = self.calibration.get("data", "other data"), self.calibration.get("budget")
        return f"on {data}" + (f" for budget {budget:g}" if isinstance(budget, int | float) else "")

    @property
    def full_route(self) -> Route:
        """The route that keeps all tokens (the teacher's)."""
        return (0,) * len(self.sites)

    @property
    def own_routes(self) -> tuple[Route, ...]:
        """The static route alone; empty where the routers choose."""
        return () if self.static_route is None else (self.static_route,)

    @property
    def num_routes(self) -> int:
        """How many routes are listed."""
        return len(self.routes or ())

    def with_all_routes(self) -> "PyramidConfig":
        """Return it with all routes that its sites allow, as candidates: none of them is scored by a router."""
        return replace(self, routes=None, mean_losses=(), router=replace(self.router, output="distortion"))

    def num_scores(self, site: int) -> int:
        """Return the outputs of a site's router."""
        return self.num_routes if self.router.output == "routes" else len(self.sites[site].experts)

    def experts(self, route: Route) -> list[Expert]:
        """Return the experts that a route takes."""
        return [site.experts[k] for site, k in zip(self.sites, route, strict=True)]

    def segments(self, num_layers: int) -> list[range]:
        """Return the decoder layers between sites: num_sites + 1 ranges that cover all layers."""
        return segments_between([site.after_layer for site in self.sites], num_layers)

    def takes(self, grids: Sequence[Grid]) -> bool:
        """Say whether a sample with these grids is pooled (and gated) at all."""
        return num_tokens(grids) >= self.min_input_tokens

    def offered(self, site: int, grids: Sequence[Grid]) -> list[int]:
        """Return the indices of a site's experts that a sample with these grids can be given; the first always can."""
        if not self.takes(grids):
            return [0]
        experts = self.sites[site].experts
        return [k for k, each in enumerate(experts) if each.is_offered(grids, self.min_visual_tokens, self.rounding)]

    def walk(self, route: Route, grids: Sequence[Grid]) -> list[tuple[Grid, ...]]:
        """Return the grids in every segment along `route`: num_sites + 1 of them.

        Raises:
            ValueError: if the route has the wrong length or takes an expert that is not offered.
        """
        if len(route) != len(self.sites):
            raise ValueError(f"route {route} has {len(route)} entries, the pyramid has {len(self.sites)} sites")
        stages = [tuple(grids)]
        for site, k in enumerate(route):
            experts = self.sites[site].experts
            if not 0 <= k < len(experts):
                raise ValueError(f"route {route}: site {site} has experts 0 to {len(experts) - 1}, not {k}")
            if not self.takes(stages[-1]):
                stages.append(stages[-1])
                continue
            if grids and not experts[k].is_offered(stages[-1], self.min_visual_tokens, self.rounding):
                names = ",".join(map(str, self.experts(route)))
                raise ValueError(f"route {names}: {self._refusal(experts[k], stages[-1])} at site {site}")
            stages.append(experts[k].left(stages[-1], self.rounding))
        return stages

    def _refusal(self, expert: Expert, grids: Sequence[Grid]) -> str:
        """Say why an expert cannot be given to a sample with these grids."""
        pictures = pictures_of(grids)
        if expert.cells and not pictures:
            return f"{expert} needs a grid of tokens, and a selection has left none,"
        if expert.share and num_tokens(expert.left(grids)) >= num_tokens(grids):
            return f"{expert} would keep all of {num_tokens(grids)} tokens"
        found = f"{num_tokens(grids)} tokens"
        if expert.share is None:
            found = "an image of {}×{} tokens".format(*min(pictures, key=lambda grid: num_tokens([grid])))
        return f"{expert} would leave fewer than {self.min_visual_tokens} (min_visual_tokens) of {found}"

    def routes_for(self, grids: Sequence[Grid]) -> Iterator[Route]:
        """Return every route that is offered to a sample with these grids, the full route first."""
        routes = product(*(range(len(site.experts)) for site in self.sites)) if self.routes is None else self.routes
        return (route for route in routes if self.can_walk(route, grids))

    def can_walk(self, route: Route, grids: Sequence[Grid]) -> bool:
        """Say whether a sample with these grids can take a route."""
        try:
            self.walk(route, grids)
        except ValueError:
            return False
        return True

    def options(self, prefix: Route, grids: Sequence[Grid]) -> list[Option]:
        """Return what a router can choose after some experts were taken, the full route's expert first.

        Args:
            prefix: the experts that the sites before have taken.
            grids: the sample's, before any reduction.
        """
        site = len(prefix)
        rest = (0,) * (len(self.sites) - site)
        if self.routes is None:
            stage = self.walk((*prefix, *rest), grids)[site]
            return [Option(k, k, (*prefix, k, *rest[1:])) for k in self.offered(site, stage)]
        offered = set(self.routes_for(grids))
        on_the_way = [(i, route) for i, route in enumerate(self.routes) if route[:site] == prefix and route in offered]
        if not on_the_way:  # a route that is forced here and there need not be one that is offered
            return [Option(0, 0, (*prefix, *rest))]
        return [Option(route[site], i, route) for i, route in on_the_way]

    @property
    def budget(self) -> float | None:
        """The budget that λ stands for by the budget table; None where there is no table, or no limit (λ = 0)."""
        if not self.budgets or self.trade_off <= 0:
            return None
        return fraction_at(self.budgets, self.trade_off)

    def trust(self, trade_off: float) -> float:
        """Return how far the routers' predictions count at λ: see `Budget.trust`."""
        return trust_at(self.budgets, trade_off)

    def trade_off_for(self, budget: float) -> float:
        """Return the λ that spends `budget` on average, interpolated in the budget table; 0 for a budget of 1.

        Where no λ spends the budget, the one that spends less is taken.

        Raises:
            ValueError: if there is no table yet, or the budget is below its cheapest row or above 1.
        """
        if not 0 < budget <= 1:
            raise ValueError(f"a budget is a fraction of the full prefill FLOPs, between 0 and 1, not {budget}")
        if self.static_route is not None:
            names = ",".join(map(str, self.experts(self.static_route)))
            raise ValueError(f"this pyramid has the fixed route {names}, whatever the budget: leave the budget out")
        if self.is_imported:
            raise ValueError(f"this pyramid was trained together with the model and has no budgets: {IMPORTED_USE}")
        if not self.budgets:
            raise ValueError("the routers are not calibrated: run `dpn calibrate` first, or force a route")
        if budget == 1:  # the full route, though the routers' own FLOPs take it a little past 1
            return 0.0
        return trade_off_at(self.budgets, budget)

    @property
    def predictors(self) -> dict[str, tuple[str, int]]:
        """The predictors: the kind of expert that has each, and the layer after its site, by name."""
        fitted = {
            (site.after_layer + 1, expert.kind)
            for site in self.sites
            for expert in site.experts
            if KINDS[expert.kind].predictor_tensors
        }
        return {predictor_name(kind, layer): (kind, layer) for layer, kind in sorted(fitted)}

    @property
    def predictor_layers(self) -> list[int]:
        """The layers before which predictors choose tokens."""
        return sorted({layer for _, layer in self.predictors.values()})

    def dpe_tensors(self, hidden_size: int) -> Shapes:
        """Return the shapes of the tensors that the pyramid adds, by their name inside the text model."""
        shapes: Shapes = {}
        for i, site in enumerate(self.sites):
            if self.has_routers:
                router = self.router.tensors(hidden_size, self.num_scores(i))
                shapes |= {f"routers.{i}.{name}": shape for name, shape in router.items()}
            if self.pooling == "conv":
                for k, expert in enumerate(site.experts):
                    shapes[f"poolers.{i}.{k}"] = (hidden_size, *(expert.cells or (1, 1)))
        for predictor, (kind, _) in self.predictors.items():
            tensors = KINDS[kind].predictor_tensors
            assert tensors is not None
            shapes |= {f"predictors.{predictor}.{name}": size for name, size in tensors(hidden_size).items()}
        return shapes


def _check_fields(part: Any) -> None:
    """Check the plain fields of a dataclass that was read from JSON.

    Raises:
        ValueError: with the first one that is of another kind than it says.
    """
    for each in fields(part):
        value, kind = getattr(part, each.name), each.type
        if get_origin(kind) is Literal:
            good = value in get_args(kind)
        elif kind is int:
            good = type(value) is int and value >= 0
        elif kind is float:
            good = type(value) in (int, float) and isfinite(value)
        elif kind == int | None:
            good = value is None or type(value) is int
        else:
            good = get_origin(kind) is not dict or isinstance(value, dict)
        if not good:
            raise ValueError(f"pyramid config has an impossible {each.name}: {value!r}")


def predictor_name(kind: str, layer: int) -> str:
    """Return the name of an expert's predictor before a layer.

    Those of `predicted` were the first, and are found by the layer alone.
    """
    return str(layer) if kind == "predicted" else f"{kind}_{layer}"


def segments_between(after_layers: Sequence[int], num_layers: int) -> list[range]:
    """Return the decoder layers between sites; after layer -1 is before the first one."""
    edges = [0, *(layer + 1 for layer in after_layers), num_layers]
    return [range(start, stop) for start, stop in pairwise(edges)]
