"""What a pyramid is, without torch: sites, rates, and what a route does to a sample's visual grids.

A *site* sits after a decoder layer and offers *rates*; a *route* is one rate (an expert index) per site; a
sample's visual tokens are one or several *grids* (H, W). All of it is plain data, stored as `pyramid` in config.json.

Some families end every row of a mosaic of tiles with a newline token. The newlines of H rows are a grid (H, 1) of
their own, after the mosaic's: when rows merge, so do their newlines, and each stands after its merged row. A column
is never narrowed, and no rate is withheld for its sake.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise, product
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

Rate = tuple[int, int]  # (kernel_h, kernel_w); the stride equals the kernel
Grid = tuple[int, int]  # (H, W) visual tokens
Block = tuple[Grid, ...]  # grids of equally many rows, whose tokens come row by row: of each the first, the second, …
Route = tuple[int, ...]  # one expert index per site
Shapes = dict[str, tuple[int, ...]]  # of tensors, by name

PYRAMID_VERSION = 1

# What a router may read, by the vectors of hidden_size that it is made of: see `ROUTER_VECTORS` in modeling/routers.py.
ROUTER_INPUTS = {
    "last_instruction_token": ("read",),  # paper, section 3.3
    "with_summaries": ("read", "text_mean", "visual_mean", "visual_max"),  # ours
}

if TYPE_CHECKING:
    RouterInput = str
else:
    RouterInput = Literal[tuple(ROUTER_INPUTS)]
RouterOutput = Literal["distortion", "logits"]
Pooling = Literal["avg", "max", "conv"]
Gate = Literal["none", "probability"]
Positions = Literal["persistent", "contiguous"]
Rounding = Literal["ceil", "floor"]

IMPORTED_KEY = "imported"  # in `calibration`
IMPORTED_USE = (
    "use it without a budget, as it was trained, or fix a route (`dpn run --route`, `dpn export --static`, "
    "model.set_route)"
)


@dataclass(frozen=True)
class Site:
    """One place where visual tokens are pooled: after decoder layer `after_layer` (0-based)."""

    after_layer: int
    rates: tuple[Rate, ...]


@dataclass(frozen=True)
class RouterConfig:
    """The router's shape.

    Attributes:
        kind: `mlp` (paper, section 3.3), or `linear`, one layer without a norm (the authors' second version).
        hidden_ratio: the hidden width of an mlp is hidden_size // hidden_ratio.
        input: one of `ROUTER_INPUTS`: `last_instruction_token`, or `with_summaries`, beside it the mean of the prompt's
            text tokens, and the mean and the maximum of its visual tokens.
        token_id: read this token of the prompt, the mean where there are several, in place of the last instruction
            token (the authors' `<ROUTER>`).
        output: `distortion`, logit_k = -softplus(z_k) and logit_0 = 0 (ours), or `logits`, logit_k = z_k (paper).
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

    def tensors(self, hidden_size: int, num_experts: int) -> Shapes:
        """Return the shapes of a router's tensors, by name."""
        inputs = width = hidden_size * self.num_inputs
        shapes: Shapes = {}
        if self.kind == "mlp":
            width = hidden_size // self.hidden_ratio
            shapes = {"norm.weight": (inputs,), "norm.bias": (inputs,)}
            shapes |= {"hidden.weight": (width, inputs), "hidden.bias": (width,)}
        return shapes | {"head.weight": (num_experts, width), "head.bias": (num_experts,)}


@dataclass(frozen=True)
class Budget:
    """One row of the budget table that calibration measures.

    Attributes:
        fraction: mean fraction of the unpooled LLM's prefill FLOPs, over the held-out calibration samples.
        trade_off: the λ that reaches it.
        distortion: mean KL divergence from the teacher, in nats, at that λ.
    """

    fraction: float
    trade_off: float
    distortion: float


@dataclass(frozen=True)
class PyramidConfig:
    """Everything that turns a decoder into a pyramid.

    Attributes:
        sites: in the order of their layers.
        pooling: `avg`, `max`, or `conv` (depthwise, initialised as avg).
        gate: `none`, or `probability`: pooled tokens are scaled by the chosen softmax(logits / 10) (paper, eq. 4).
        positions: `persistent` (a merged token takes the mean position of its cell; text keeps its own), or
            `contiguous` (re-indexed in every segment, as the paper's authors do).
        rounding: `ceil` keeps the incomplete cells at a grid's edge, `floor` drops them.
        prepooling: side of the squares in which the vision tower's features are averaged, before the projector.
        min_visual_tokens: a rate that would leave a grid with fewer tokens is not offered.
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
    pooling: Pooling = "avg"
    gate: Gate = "none"
    positions: Positions = "persistent"
    rounding: Rounding = "ceil"
    router: RouterConfig = field(default_factory=RouterConfig)
    prepooling: int = 1
    min_visual_tokens: int = 16
    min_input_tokens: int = 1
    trade_off: float = 0.0
    static_route: Route | None = None
    answer_cue: tuple[int, ...] = ()
    budgets: tuple[Budget, ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PyramidConfig":
        """Read the `pyramid` section of a config.json.

        Raises:
            ValueError: for another version, unknown keys, impossible values, or a site whose first rate is not 1×1.
        """
        data = dict(data)
        version = data.pop("version", None)
        if version != PYRAMID_VERSION:
            raise ValueError(f"pyramid config has version {version!r}, this dpn reads version {PYRAMID_VERSION}")
        known = {"lambda", "gated_route", *cls.__dataclass_fields__} - {"trade_off"}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"pyramid config has unknown keys: {', '.join(unknown)}")
        sites = tuple(
            Site(int(site["after_layer"]), tuple((int(h), int(w)) for h, w in site["rates"]))
            for site in data.pop("sites")
        )
        ungated, gated = data.pop("static_route", None), data.pop("gated_route", None)
        route = gated if ungated is None else ungated
        if ungated is not None:  # once stored for pyramids with a gate too, whose routers and gate were left out
            data["gate"] = "none"
        config = cls(
            sites=sites,
            router=RouterConfig(**data.pop("router", {})),
            trade_off=data.pop("lambda", 0.0),
            static_route=None if route is None else tuple(map(int, route)),
            answer_cue=tuple(map(int, data.pop("answer_cue", ()))),
            budgets=tuple(Budget(*row) for row in data.pop("budgets", [])),
            **data,
        )
        config._check()
        return config

    def _check(self) -> None:
        """Raise ValueError for what a pyramid cannot be."""
        for part in (self, self.router, *self.budgets):
            _check_fields(part)
        for site in self.sites:
            if site.rates[:1] != ((1, 1),):
                raise ValueError("the first rate of every pyramid site must be 1×1 (expert 0 pools nothing)")
            if any(side < 1 for rate in site.rates for side in rate):
                raise ValueError(f"a pyramid site has impossible rates: {site.rates}")
        route, rates = self.static_route, [len(site.rates) for site in self.sites]
        if route is not None:
            fits = len(route) == len(rates) and all(0 <= k < n for k, n in zip(route, rates, strict=True))
            if not fits:
                raise ValueError(f"the static route {list(route)} does not fit the pyramid's sites")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; the inverse of `from_dict`."""
        data = asdict(self)
        data["lambda"] = data.pop("trade_off")
        data["sites"] = [{"after_layer": s.after_layer, "rates": [list(r) for r in s.rates]} for s in self.sites]
        data["static_route"] = None if self.static_route is None else list(self.static_route)
        if self.static_route is not None and self.has_routers:
            data["gated_route"] = data.pop("static_route")
        data["answer_cue"] = list(self.answer_cue)
        data["budgets"] = [[b.fraction, b.trade_off, b.distortion] for b in self.budgets]
        return {"version": PYRAMID_VERSION, **data}

    @property
    def has_routers(self) -> bool:
        """Whether there are routers: to choose a rate, or for the gate of a rate that is fixed."""
        return self.static_route is None or self.gate != "none"

    @property
    def is_imported(self) -> bool:
        """Whether it came with the source: its routers were trained with the model, and have no budgets."""
        return bool(self.calibration.get(IMPORTED_KEY))

    @property
    def full_route(self) -> Route:
        """The route that pools nothing (the teacher's)."""
        return (0,) * len(self.sites)

    @property
    def own_routes(self) -> tuple[Route, ...]:
        """The static route alone; empty where the routers choose."""
        return () if self.static_route is None else (self.static_route,)

    def segments(self, num_layers: int) -> list[range]:
        """Return the decoder layers between sites: num_sites + 1 ranges that cover all layers."""
        return segments_between([site.after_layer for site in self.sites], num_layers)

    def pooled(self, grid: Grid, rate: Rate) -> Grid:
        """Return the size of `grid` after pooling at `rate`."""
        up = self.rounding == "ceil"
        height, width = (-(-n // k) if up else n // k for n, k in zip(grid, kernel_on(grid, rate), strict=True))
        return height, width

    def takes(self, grids: Sequence[Grid]) -> bool:
        """Say whether a sample with these grids is pooled (and gated) at all."""
        return num_tokens(grids) >= self.min_input_tokens

    def offered(self, site: int, grids: Sequence[Grid]) -> list[int]:
        """Return the expert indices that `site` offers to a sample with these grids; 1×1 always is."""
        if not self.takes(grids):
            return [0]
        experts = []
        for k, rate in enumerate(self.sites[site].rates):
            sizes = [num_tokens([self.pooled(grid, rate)]) for grid in _without_newlines(grids)]
            if rate == (1, 1) or (sizes and min(sizes) >= self.min_visual_tokens):
                experts.append(k)
        return experts

    def walk(self, route: Route, grids: Sequence[Grid]) -> list[list[Grid]]:
        """Return the grids in every segment along `route`: num_sites + 1 lists.

        Raises:
            ValueError: if the route has the wrong length or takes an expert that is not offered.
        """
        if len(route) != len(self.sites):
            raise ValueError(f"route {route} has {len(route)} entries, the pyramid has {len(self.sites)} sites")
        stages = [list(grids)]
        for site, expert in enumerate(route):
            rates = self.sites[site].rates
            if not 0 <= expert < len(rates):
                raise ValueError(f"route {route}: site {site} has experts 0 to {len(rates) - 1}, not {expert}")
            if not self.takes(stages[-1]):
                stages.append(stages[-1])
                continue
            if grids and expert not in self.offered(site, stages[-1]):
                kernel, small = (
                    "×".join(map(str, rates[expert])),
                    min(_without_newlines(stages[-1]), key=lambda grid: num_tokens([grid]), default=(0, 0)),
                )
                raise ValueError(
                    f"route {route}: {kernel} at site {site} would leave an image of {small[0]}×{small[1]} tokens "
                    f"with fewer than min_visual_tokens ({self.min_visual_tokens})"
                )
            stages.append([self.pooled(grid, rates[expert]) for grid in stages[-1]])
        return stages

    def routes(self, grids: Sequence[Grid]) -> Iterator[Route]:
        """Yield every route that is offered to a sample with these grids, the full route first."""
        for route in product(*(range(len(site.rates)) for site in self.sites)):
            try:
                self.walk(route, grids)
            except ValueError:
                continue
            yield route

    @property
    def budget(self) -> float | None:
        """The budget that λ stands for by the budget table; None where there is no table, or no limit (λ = 0)."""
        if not self.budgets or self.trade_off <= 0:
            return None
        above = Budget(1.0, 0.0, 0.0)
        for row in self.budgets:
            if row.trade_off >= self.trade_off:
                share = (self.trade_off - above.trade_off) / max(row.trade_off - above.trade_off, 1e-12)
                return round(above.fraction + share * (row.fraction - above.fraction), 6)
            above = row
        return above.fraction

    def trade_off_for(self, budget: float) -> float:
        """Return the λ that spends `budget` on average, interpolated in the budget table; 0 for a budget of 1.

        Raises:
            ValueError: if there is no table yet, or the budget is below its cheapest row or above 1.
        """
        if not 0 < budget <= 1:
            raise ValueError(f"a budget is a fraction of the full prefill FLOPs, between 0 and 1, not {budget}")
        if self.static_route is not None:
            raise ValueError(f"this pyramid's route is fixed, whatever the budget: {list(self.static_route)}")
        if self.is_imported:
            raise ValueError(f"this pyramid came with its source and has no budgets: {IMPORTED_USE}")
        if not self.budgets:
            raise ValueError("the routers are not calibrated: run `dpn calibrate` first, or force a route")
        if budget == 1:  # the full route, though the routers' own FLOPs take it a little past 1
            return 0.0
        above = Budget(1.0, 0.0, 0.0)
        for row in self.budgets:
            if row.fraction <= budget:
                share = (above.fraction - budget) / max(above.fraction - row.fraction, 1e-12)
                return above.trade_off + min(share, 1.0) * (row.trade_off - above.trade_off)
            above = row
        raise ValueError(f"budget {budget} is out of reach: this pyramid's cheapest is {above.fraction:.3f}")

    def dpe_tensors(self, hidden_size: int) -> Shapes:
        """Return the shapes of the tensors that the pyramid adds, by their name inside the text model."""
        shapes: Shapes = {}
        for i, site in enumerate(self.sites):
            if self.has_routers:
                router = self.router.tensors(hidden_size, len(site.rates))
                shapes |= {f"routers.{i}.{name}": shape for name, shape in router.items()}
            if self.pooling == "conv":
                for k, (kernel_h, kernel_w) in enumerate(site.rates):
                    shapes[f"poolers.{i}.{k}"] = (hidden_size, kernel_h, kernel_w)
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


def segments_between(after_layers: Sequence[int], num_layers: int) -> list[range]:
    """Return the decoder layers between sites; after layer -1 is before the first one."""
    edges = [0, *(layer + 1 for layer in after_layers), num_layers]
    return [range(start, stop) for start, stop in pairwise(edges)]


def num_tokens(grids: Iterable[Grid]) -> int:
    """Return the visual tokens of some grids together."""
    return sum(height * width for height, width in grids)


def kernel_on(grid: Grid, rate: Rate) -> Rate:
    """Return the kernel of a rate on a grid: a column, such as that of newlines, is not narrowed."""
    return (rate[0], 1) if grid[1] == 1 else rate


def _without_newlines(grids: Sequence[Grid]) -> list[Grid]:
    """Return the grids of more than one column: those of pictures."""
    return [grid for grid in grids if grid[1] > 1]
