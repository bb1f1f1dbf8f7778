"""The calibration section of a recipe: what is measured, fitted and trained. No torch."""

import math
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from dpn_cli.limits import MAX_SAMPLES, MAX_SEED
from dpn_cli.pyramid.experts import known_kind
from dpn_cli.pyramid.section import Section

SAMPLES_PER_ROUTE = 1024  # to fit routers to: up to there, more tell more of a route

ExpertKind = Annotated[str, AfterValidator(known_kind)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class TrainingRecipe(Section):
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


class SurveyRecipe(Section):
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


class PredictorRecipe(Section):
    """How the predictors are fitted, where experts have any.

    Attributes:
        samples: Number of samples to learn from, where that is more than the calibration measures; those that come in
            addition take no part in fitting the routers to measurements.
        epochs: Number of passes over these samples.
    """

    samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1536
    epochs: Annotated[int, Field(ge=1)] = 12


class CalibrationRecipe(Section):
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
